"""Routers while they are trained: what they give is noted, other choices are tried, their load is evened out.

Legend: T tokens, D hidden size, L layers with routers, R routed experts, K chosen, X that run beside them, M = K + X.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from moeify.training.model import SELECTION_BIAS, Student

# One in so many of all experts runs beside the chosen ones while routers are trained.
EXTRA_EXPERTS = 8
# Width of the sigmoid around the boundary, in standard deviations of a token's scores. It must be narrower than the
# noise, or experts that are always there count without their absence: on a small trained llama stage `router` lowered
# the divergence from 0.0207 to 0.0193 with 0.03 and raised it to 0.0208 with 0.25.
SOFTNESS = 0.04


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
        for number, layer in enumerate(chain(*map(student.model.get_submodule, student.blocks.names))):
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
            logits_TR, _, chosen_TK = output if _logits_first(output) else output[::-1]
            self.routed.append((logits_TR, chosen_TK))

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

    Measured as divergence from the teacher on held-out text: a trained llama of 2 layers, 32 experts, half of them
    active, stage `full` on 65k tokens. Before 0.0149; with the gradient of chosen experts' weights 0.0095, with frozen
    routers 0.0086, with exploration 0.0071. Stage `router` alone: 0.0108 (2 cores of an Intel Xeon, PyTorch 2.13,
    2026-11-22).

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
            if not module.training:
                return None
            return _widened(*output) if _logits_first(output) else _widened(*output[::-1])[::-1]

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


def _logits_first(output: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Routers return (logits_TR, weights_TK, chosen_TK), that of granitemoeshared in transformers 5.17 in reverse."""
    return output[0].is_floating_point()


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
