"""The model that is trained: what a stage trains of it, and its state between stages."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from moeify import families, targets
from moeify.check.evaluate import load
from moeify.errors import InputError, UsageError
from moeify.export.in_memory import routed_layers
from moeify.export.writer import weights_are_exact
from moeify.families import Blocks, FFNFormat
from moeify.models.dense import blocks_of
from moeify.plan import SplitPlan
from moeify.targets import Target
from moeify.training.options import FinetuneOptions, Stage

SELECTION_BIAS = "e_score_correction_bias"
# Of a router that gives a token as many experts as have higher scores.
THRESHOLD = "threshold"
# alpha / rank of LoRA: updates count twice, as is usual.
LORA_ALPHA_PER_RANK = 2


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
        target = None
        if plan is not None and not plan.layout.is_static:
            family = families.find(plan.family, model.config)
            target = targets.find(plan.target, family, blocks_of(model, family))
        student = cls(path, model, plan, target)
        if target is not None:
            student.routers = [
                model.get_submodule(f"{target.block(layer)}.{target.modules.router}") for layer in student.routed_layers
            ]
        for router in student.routers:
            keep_full_precision(router)
        return student

    @property
    def blocks(self) -> Blocks:
        """The blocks, by their names in the model."""
        if self.target is not None:
            return self.target.blocks
        return blocks_of(self.model, families.of(self.model.config))

    @property
    def activation(self) -> str:
        """Of the FFNs; every target has it under the name that most families use."""
        config, text = self.model.config, self.model.config.get_text_config()
        if self.target is not None:
            return str(text.hidden_act if self.target.is_stock else config.expert_activation)
        return families.of(config).activation_of(text)

    @property
    def dense_ffn(self) -> FFNFormat:
        """How FFNs lie that are not cut into experts."""
        return families.of(self.model.config).ffn if self.target is None else self.target.dense_ffn

    @property
    def routed_layers(self) -> list[int]:
        """Layers with experts that are chosen."""
        if self.plan is None or self.target is None:
            return []
        return routed_layers(self.plan.layout, len(self.plan.layers))

    @property
    def scale(self) -> float:
        """Of stored router scores."""
        return 1.0 if self.plan is None else self.plan.router_scale

    @property
    def has_selection_bias(self) -> bool:
        return any(hasattr(router, SELECTION_BIAS) for router in self.routers)

    def router_weights(self) -> list[nn.Parameter]:
        if self.target is None:
            return []
        names = self.target.modules.router_parts
        return [part for router in self.routers for name, part in router.named_parameters() if name in names]

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes: parameters with a gradient, selection biases, and thresholds."""
        tensors: dict[str, Tensor] = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        ends = (f".{SELECTION_BIAS}", f".{THRESHOLD}")
        return tensors | {n: b for n, b in self.model.named_buffers() if n.endswith(ends)}

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
            weight.requires_grad_(stage == "router" or options.rate_of_routers(stage) > 0)
        return tuner

    def apply(self, stage: Stage, options: FinetuneOptions, state: Mapping[str, Tensor]) -> None:
        """Put the result of a finished stage into the model."""
        tuner = self.prepare(stage, options) if stage == "lora" else None
        self.load_state(state)
        if tuner is not None:
            tuner.merge_and_unload()


def check_stages(plan: SplitPlan | None, options: FinetuneOptions, path: Path) -> None:
    """Refuse a stage that has nothing to train.

    Where the weight of an expert is always one, exploration alone brings a gradient to its router. A trained llama of 2
    layers as moeify's own model, 4 of 8 experts, stage `router` on 32k tokens: divergence from 0.0207 to 0.0200 with
    it, as in granitemoeshared, and without it, moved by the losses of an even load alone, to 0.0299 (2 cores of an
    Intel Xeon, PyTorch 2.13, 2026-11-26).

    Raises:
        InputError: the model has no routers, or none that a gradient reaches.
        UsageError: the FFNs are no longer the dense model's.
    """
    stages, routed = options.stage, plan is not None and plan.is_routed
    if "router" in stages and not routed:
        raise InputError(f"{path} has no routers to train", "--stage full or --stage lora trains it")
    exact = routed and plan is not None and weights_are_exact(targets.find(plan.target), plan.layout)
    if "router" in stages and exact and not options.explore:
        raise InputError(
            f"the weight of an expert is one in {path} whatever its score: no gradient reaches its router",
            "--explore 0.1 brings one; --stage layers trains it by other means",
        )
    if plan and plan.layout.is_adaptive and ("router" in stages or options.router_rate):
        raise InputError(
            f"{path} gives a token as many experts as have high scores, so its routers stay as they were fitted",
            "--stage full or --stage lora trains all else; leave --router-rate out",
        )
    if "layers" in stages and plan is None:
        raise InputError(f"{path} was not cut by moeify, so there is no FFN to bring back", "leave --stage layers out")
    if "layers" in stages and plan and set(plan.trained) - {"layers"}:
        raise UsageError(
            f"{path} was trained already ({', '.join(plan.trained)})",
            "--stage layers works on what `moeify split` or --stage layers wrote",
        )


def keep_full_precision(router: nn.Module) -> None:
    """Have a router compute in its weights' type under autocast as well; in place.

    Scores are at most ROUTER_LIMIT * ROUTER_SCALE = 2^-8 so that weights stay near one; ranking needs differences.
    Behind a sigmoid (glm4_moe) bfloat16 numbers are 2^-8 apart, so that all experts become equal; before a softmax a
    rounded score still exchanges one token in a hundred.
    """
    router.forward = MethodType(_without_autocast, router)


def _without_autocast(router: nn.Module, hidden: Tensor, *others: Any) -> Any:
    with torch.autocast(hidden.device.type, enabled=False):
        return type(router).forward(router, hidden.to(next(router.parameters()).dtype), *others)


def _inject_lora(student: Student, options: FinetuneOptions) -> Any:
    """Low-rank updates for every linear map of the layers and for all experts, which are one parameter a layer."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    blocks = student.blocks
    names = [
        f"{block}.{name}"
        for block in blocks.names
        for name, module in student.model.get_submodule(block).named_modules()
        # A gate of one output has no rank to speak of.
        if isinstance(module, nn.Linear) and module.out_features > 1
    ]
    experts = "" if student.target is None else student.target.modules.experts
    parameters = [
        f"{blocks.site(layer)}.{experts}.{part}"
        for layer in student.routed_layers
        for part, weight in student.model.get_submodule(f"{blocks.site(layer)}.{experts}").named_parameters()
        if weight.ndim == 3
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
