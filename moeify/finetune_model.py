"""The model that is trained: what a stage trains of it, its routers under observation, its state between stages.

Legend: R routed experts, D hidden size.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify import targets
from moeify.errors import InputError, UsageError
from moeify.evaluate import load
from moeify.finetune_options import FinetuneOptions, Stage
from moeify.native import cut_layers, router_scale
from moeify.plan import SplitPlan
from moeify.targets import Target

SELECTION_BIAS = "e_score_correction_bias"
# alpha / rank of LoRA: updates count twice, as is usual.
LORA_ALPHA_PER_RANK = 2
# One in so many of all experts runs beside the chosen ones while routers are trained.
EXTRA_EXPERTS = 8
# Width of the sigmoid around the boundary, in standard deviations of a token's scores. It must be narrower than the
# noise, or experts that are always there count without their absence: on a small trained llama stage `router` lowered
# the divergence from 0.0207 to 0.0193 with 0.03 and raised it to 0.0208 with 0.25.
SOFTNESS = 0.04


@dataclass
class Student:
    """A converted, pruned or dense model and what is known of it.

    Args:
        path: the checkpoint's folder.
        model: as stock transformers loaded it, float32.
        plan: None if moeify did not make it.
        target: its MoE architecture; None for a dense or pruned one.
        routers: of the layers that have one, in order.
    """

    path: Path
    model: Any
    plan: SplitPlan | None
    target: Target | None
    routers: list[nn.Module] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, plan: SplitPlan | None) -> "Student":
        model = load(str(path), dtype="float32")
        target = None if plan is None or plan.layout.is_static else targets.find(plan.target)
        student = cls(path, model, plan, target)
        if target is not None:
            student.routers = [
                model.model.layers[layer].get_submodule(target.modules.router) for layer in student.cut_layers
            ]
        return student

    @property
    def cut_layers(self) -> list[int]:
        """Layers with experts."""
        if self.plan is None or self.target is None:
            return []
        return cut_layers(self.plan.layout, len(self.plan.layers))

    @property
    def scale(self) -> float:
        """Of stored router scores."""
        return 1.0 if self.plan is None else router_scale(self.plan)

    @property
    def has_selection_bias(self) -> bool:
        return any(hasattr(router, SELECTION_BIAS) for router in self.routers)

    def router_weights(self) -> list[nn.Parameter]:
        return [weight for router in self.routers if isinstance(weight := router.weight, nn.Parameter)]

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes: parameters with a gradient, and selection biases."""
        tensors: dict[str, Tensor] = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        return tensors | {n: b for n, b in self.model.named_buffers() if n.endswith(SELECTION_BIAS)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put what was trained back.

        Raises:
            InputError: the state is of another model.
        """
        unexpected = self.model.load_state_dict(dict(state), strict=False).unexpected_keys
        if unexpected:
            raise InputError(
                f"the saved state has {unexpected[0]}, which {self.path} has not", "--overwrite starts anew"
            )

    def prepare(self, stage: Stage, options: FinetuneOptions) -> Any:
        """Choose what a stage trains; returns the LoRA tuner, which alone can merge its updates, or None."""
        self.model.requires_grad_(stage == "full")
        tuner = _inject_lora(self, options) if stage == "lora" else None
        for weight in self.router_weights():
            weight.requires_grad_()
        return tuner

    def apply(self, stage: Stage, options: FinetuneOptions, state: Mapping[str, Tensor]) -> None:
        """Put the result of a finished stage into the model."""
        tuner = self.prepare(stage, options) if stage == "lora" else None
        self.load_state(state)
        if tuner is not None:
            tuner.merge_and_unload()


def check_stages(plan: SplitPlan | None, stages: tuple[Stage, ...], path: Path) -> None:
    """Refuse a stage that has nothing to train.

    Raises:
        InputError: the model has no routers, or none that a gradient reaches.
        UsageError: the FFNs are no longer the dense model's.
    """
    routed = plan is not None and not plan.layout.is_static
    if "router" in stages and not routed:
        raise InputError(f"{path} has no routers to train", "--stage full or --stage lora trains it")
    if (
        "router" in stages
        and plan
        and plan.layout.num_routed_active == 1
        and plan.target not in ("glm4_moe", "qwen2_moe")
    ):
        raise InputError(
            f"the weight of a single routed expert is always one in {plan.target}: no gradient reaches its router",
            "--stage layers trains it by other means",
        )
    if "layers" in stages and plan is None:
        raise InputError(f"{path} was not cut by moeify, so there is no FFN to bring back", "leave --stage layers out")
    if "layers" in stages and plan and set(plan.trained) - {"layers"}:
        raise UsageError(
            f"{path} was trained already ({', '.join(plan.trained)})",
            "--stage layers works on what `moeify split` or --stage layers wrote",
        )


class RouterWatch:
    """Notes what routers give and whether layers stay finite, while it is told to watch.

    Activation checkpointing runs layers again in the backward pass; what they give then is not noted twice.

    Args:
        student: whose model is watched.
        explorer: what routers give while it trains; None leaves it as it is.
    """

    def __init__(self, student: Student, explorer: "Explorer | None" = None) -> None:
        self._watching = False
        self.routed: list[tuple[Tensor, Tensor]] = []
        self._finite: dict[int, Tensor] = {}
        handles = [router.register_forward_hook(self._note_router) for router in student.routers]
        if explorer is not None:
            # After the notes, which are of what the router itself gives.
            for number, router in enumerate(student.routers):
                handles += explorer.attach(number, router)
        for number, layer in enumerate(student.model.model.layers):
            handles.append(layer.register_forward_hook(self._layer_hook(number)))
        self._handles = handles

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.routed, self._finite, self._watching = [], {}, True
        try:
            yield
        finally:
            self._watching = False

    def first_bad_layer(self) -> int | None:
        """The first layer of the last pass that gave NaN or infinity."""
        return next((layer for layer, finite in sorted(self._finite.items()) if not finite), None)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note_router(self, _: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._watching:
            self.routed.append((output[0], output[2]))

    def _layer_hook(self, number: int) -> Any:
        def note(_: Any, __: Any, output: Any) -> None:
            if self._watching:
                hidden_BCD = output[0] if isinstance(output, tuple) else output
                self._finite[number] = hidden_BCD.detach().isfinite().all()

        return note


class Explorer:
    """Lets end-to-end training find out what other choices of experts would have been worth.

    The gradient of a chosen expert's weight says what a little less of it would do, not what its absence would, and of
    the others it says nothing: trained on that alone, routers get worse. Here a little noise on the router's input
    makes experts near the boundary come and go, the best of those that were not chosen run with weight zero, and all
    of them feel their gradient through a sigmoid around the boundary. Averaged over presence and absence the slope of
    a quadratic is its true difference, so what a router learns is what a choice is worth.

    Legend: T tokens, D hidden size, R routed experts, K chosen, M of them that run.
    """

    def __init__(self, noise: float) -> None:
        self.noise = noise
        self._seeds: list[int] = []

    def begin(self, seeds: list[int]) -> None:
        """One seed for each block of the batch, so that its noise does not depend on what is beside it."""
        self._seeds = seeds

    def attach(self, number: int, router: nn.Module) -> list[Any]:
        def disturb(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (self._disturbed(number, arguments[0]),) if module.training and self.noise else None

        def widen(module: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            return _widened(*output) if module.training else None

        return [router.register_forward_pre_hook(disturb), router.register_forward_hook(widen)]

    def _disturbed(self, number: int, inputs: Tensor) -> Tensor:
        rows_BTD = inputs.reshape(len(self._seeds), -1, inputs.shape[-1])
        noise = []
        for seed in self._seeds:
            generator = torch.Generator(inputs.device).manual_seed((seed * 1_000_003 + number) % (1 << 63))
            noise.append(
                torch.randn(rows_BTD.shape[1:], generator=generator, device=inputs.device, dtype=torch.float32)
            )
        size_BT1 = rows_BTD.detach().float().square().mean(dim=-1, keepdim=True).sqrt()
        return (rows_BTD + (self.noise * size_BT1 * torch.stack(noise)).to(inputs.dtype)).view_as(inputs)


def _widened(logits_TR: Tensor, weights_TK: Tensor, chosen_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The router's output for the chosen experts and the best others, these with weight zero and a gradient."""
    num_experts, num_chosen = logits_TR.shape[1], chosen_TK.shape[1]
    extra = min(num_experts - num_chosen, -(-num_experts // EXTRA_EXPERTS))
    if extra == 0:
        return logits_TR, weights_TK, chosen_TK
    scores_TR = logits_TR.float()
    others_TR = scores_TR.detach().scatter(1, chosen_TK, -torch.inf)
    next_TX = others_TR.topk(extra, dim=1).indices
    ordered_TR = scores_TR.detach().topk(num_chosen + 1, dim=1).values
    boundary_T1 = ordered_TR[:, -2:].mean(dim=1, keepdim=True)
    running_TM = torch.cat([chosen_TK, next_TX], dim=1)
    margin_TM = scores_TR.gather(1, running_TM) - boundary_T1
    spread_T1 = scores_TR.detach().std(dim=1, keepdim=True)
    soft_TM = (margin_TM / (SOFTNESS * spread_T1).clamp(min=1e-30)).sigmoid()
    plain_TM = torch.cat([weights_TK, weights_TK.new_zeros(next_TX.shape)], dim=1)
    # In units of what a chosen expert's weight is, so that a choice counts for what it would bring.
    slope_TM = (soft_TM - soft_TM.detach()) * weights_TK.detach().float().mean(dim=1, keepdim=True)
    return logits_TR, plain_TM + slope_TM.to(plain_TM.dtype), running_TM


@torch.no_grad()
def adjust_selection_biases(student: Student, load_LR: Tensor, step: float) -> None:
    """Move the bias of every expert by one step towards an even load (https://arxiv.org/abs/2408.15664).

    Args:
        student: whose routers have biases.
        load_LR: share of the choices of each expert in the last step, of all processes.
        step: in units of router scores; a quarter of the stored scale is the slope of the sigmoid they go through.
    """
    for router, load_R in zip(student.routers, load_LR, strict=True):
        bias_R = getattr(router, SELECTION_BIAS)
        bias_R += step * student.scale / 4 * (load_R.mean() - load_R).sign().to(bias_R)


def _inject_lora(student: Student, options: FinetuneOptions) -> Any:
    """Low-rank updates for every linear map of the layers and for all experts, which are one parameter a layer."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise UsageError("--stage lora needs the peft package", "pip install 'moeify[train]'") from error
    layers = student.model.get_submodule("model.layers")
    names = [
        f"model.layers.{name}"
        for name, module in layers.named_modules()
        # A gate of one output has no rank to speak of.
        if isinstance(module, nn.Linear) and module.out_features > 1
    ]
    experts = "" if student.target is None else student.target.modules.experts
    parameters = [
        f"model.layers.{layer}.{experts}.{part}"
        for layer in student.cut_layers
        for part in ("gate_up_proj", "down_proj")
    ]
    torch.manual_seed(options.seed)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=LORA_ALPHA_PER_RANK * options.lora_rank,
        target_modules=names,
        target_parameters=parameters or None,
    )
    with warnings.catch_warnings():
        # That experts of one layer share a rank is meant.
        warnings.simplefilter("ignore")
        return LoraModel(student.model, config, "default")
