"""The forms that a model can have on a machine, each counted, placed, and judged by the engine; no weight is read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moeify import engines, targets
from moeify.convert.expected_loss import expected_ratio
from moeify.convert.footprint import stored_as, weights_of
from moeify.convert.layouts import expert_counts
from moeify.convert.placement import Machine, Placement, Weights, place
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.options import GGUFType
from moeify.targets import Target

ENGINE = "llama_cpp"
LEAST_EXPERTS, BLOCK = 8, 32
EIGHTHS_ACTIVE = (4, 5, 6, 7)
# Of the active experts.
SHARED_SHARES = (0.25, 0.5, 0.75)

Kind = Literal["dense", "static", "moe"]


@dataclass(frozen=True)
class Candidate:
    """One form of the model on the machine.

    Args:
        kind: dense, statically pruned, or a mixture of experts.
        layout: None for the dense model.
        expert_width: neurons of an expert; of the whole FFN for the others.
        active_share: of the FFN that a token uses.
        shared_share: of the FFN that is always on.
        read_bytes: what a token reads on both sides.
        ratio: perplexity over dense that the table expects; None where it says nothing.
        placement: where it lies and how fast it can be at most.
        refusal: why the engine does not run it, or "".
        caution: what runs slowly or is stored in another type, or "".
    """

    kind: Kind
    layout: Layout | None
    expert_width: int
    active_share: float
    shared_share: float
    read_bytes: int
    ratio: float | None
    placement: Placement
    refusal: str
    caution: str

    @property
    def runs(self) -> bool:
        """It fits, and the engine runs it."""
        return not self.refusal and not self.placement.refusal

    def is_within(self, quality: float) -> bool:
        return self.runs and self.ratio is not None and self.ratio <= quality


@dataclass(frozen=True)
class Case:
    """What every candidate of one plan has in common."""

    dense: DenseModel
    target: Target | None
    machine: Machine
    type: GGUFType
    context: int

    def weights(self, layout: Layout | None) -> Weights:
        return weights_of(self.dense, layout, self.type, self.context)

    def place(self, weights: Weights, *, routed: bool = False) -> Placement:
        return place(weights, self.machine, routed=routed, context=self.context)


def layouts(dense: DenseModel, target: Target | None) -> Iterator[Layout]:
    """Static pruning to each share, then every candidate whose slices are equal and fill whole blocks of 32 weights."""
    if dense.num_neurons % 8 == 0:
        yield from (Layout(8, eighths, eighths) for eighths in EIGHTHS_ACTIVE)
    counts = [n for n in expert_counts(dense.num_neurons, dense.dtype) if n >= LEAST_EXPERTS]
    for experts in counts if target is not None else ():
        if dense.num_neurons % (BLOCK * experts):
            continue
        for active in (round(experts * eighths / 8) for eighths in EIGHTHS_ACTIVE):
            shared = {math.ceil(active * share) for share in SHARED_SHARES} if target and target.holds_shared else {0}
            yield from (Layout(experts, n, active) for n in sorted(shared) if n < active)


def candidate(case: Case, layout: Layout | None) -> Candidate:
    dense, weights = case.dense, case.weights(layout)
    if layout is None:
        placement = case.place(weights)
        return Candidate("dense", None, dense.num_neurons, 1.0, 1.0, weights.read_bytes, 1.0, placement, "", "")
    refusal = caution = ""
    width = layout.expert_width(dense.num_neurons)
    if not layout.is_static:
        assert case.target is not None
        engine, shape = engines.find(ENGINE), engines.Shape.of(dense, case.target.model_type, layout)
        refusal = case.target.refusal_of(engine, shape) or targets.refusal(case.target, dense, layout)
        caution = "; ".join(filter(None, (engine.caution(shape), _other_type(case.type, width))))
    return Candidate(
        kind="static" if layout.is_static else "moe",
        layout=layout,
        expert_width=width * layout.num_active if layout.is_static else width,
        active_share=layout.active_share,
        shared_share=layout.num_shared / layout.num_experts,
        read_bytes=weights.read_bytes,
        ratio=expected_ratio(layout),
        placement=case.place(weights, routed=not layout.is_static),
        refusal=refusal,
        caution=caution,
    )


def _other_type(kind: str, width: int) -> str:
    stored = stored_as(kind, width)
    return "" if stored == kind else f"down_proj of {width} neurons is stored in {stored}, not {kind}"
