"""The layouts that a search compares: one for each share of active experts, or of shared ones."""

import math
from collections.abc import Sequence
from dataclasses import replace

from moeify import engines, targets
from moeify.convert.layouts import adaptive
from moeify.convert.prepare import Prepared
from moeify.engines import Shape
from moeify.errors import InputError, UsageError
from moeify.layout import Layout
from moeify.strategies import TOLERANCE

# Shares of a cut FFN that are active, as candidates.
SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
# And one more where every layer has its own.
NEARLY_ALL = 7 / 8
# So much less than the budget a cut layer keeps, most likely.
LIKELY = 1 / 8
# Where an engine takes no dense layers, every layer is cut alike: shares of the active experts that are always on.
SHARED = (1 / 4, 1 / 2, 3 / 4)


def candidate_layouts(prepared: Prepared, budget: float) -> list[Layout]:
    """What a layer can be, if it is cut.

    Args:
        prepared: with dense layers if the target can have some.
        budget: share of all FFN parameters active per token.

    Raises:
        InputError, UsageError: there is none.
    """
    if not prepared.target.is_stock:
        return _layouts_of_layers(prepared)
    return _layouts(prepared) if prepared.layout.dense_layers else _layouts_cut_alike(prepared, budget)


def _layouts_cut_alike(prepared: Prepared, budget: float) -> list[Layout]:
    """Layouts of the budget that the engine runs: what the others share, and the least that it needs to be shared.

    Raises:
        UsageError: there is none.
    """
    experts, target = prepared.layout.num_experts, prepared.target
    active = math.floor(budget * experts + TOLERANCE)
    if not 0 < active < experts:
        raise UsageError(
            f"a budget of {budget:.3g} is not a whole number of {experts} experts", "raise --budget or --experts"
        )
    least = next((n for n in range(active) if runs(prepared, Layout(experts, n, active))), None)
    shares = {math.ceil(share * active) for share in SHARED} if target.holds_shared else {0}
    layouts = [Layout(experts, n, active) for n in sorted({*shares, *(() if least is None else (least,))})]
    # Never less than a split's own share.
    least_shared = min(shares)
    layouts = [layout for layout in layouts if layout.num_shared >= least_shared and runs(prepared, layout)]
    if not layouts:
        raise UsageError(
            f"{prepared.options.engine} runs no layout of {active} of {experts} experts", "take fewer --experts"
        )
    return layouts


def runs(prepared: Prepared, layout: Layout) -> bool:
    """The target holds it and the engine runs it."""
    target, dense = prepared.target, prepared.dense
    if layout.num_routed < 2 or layout.is_static or targets.refusal(target, dense, layout, prepared.options.mixing):
        return False
    engine = prepared.options.engine
    return not (engine and target.refusal_of(engines.named(engine), Shape.of(dense, target.model_type, layout)))


def _layouts(prepared: Prepared) -> list[Layout]:
    """One layout for each share that the number of experts allows."""
    experts = prepared.layout.num_experts
    actives = sorted({round(share * experts) for share in SHARES} - {0, experts})
    layouts = [prepared.target.layout(experts, active=active) for active in actives]
    held = prepared.layout.dense_layers
    layouts = [layout for layout in layouts if runs(prepared, replace(layout, dense_layers=held))]
    if not layouts:
        raise InputError(f"{experts} experts leave no choice", "--experts takes 4 or more")
    return layouts


def _layouts_of_layers(prepared: Prepared) -> list[Layout]:
    """Layouts of which every layer may have another: numbers of active experts, and as many slices that are always on.

    DINOv2-small, 24 experts, candidates of 1/4, 1/2 and 3/4, 1 - cosine of its last hidden states on held-out images:
    at 50 % all layers alike 0.0216 of experts and 0.0232 static, by layer 0.0222, 0.0220, and 0.0211 with both; at 75 %
    alike 0.0088 and 0.0078, by layer 0.0078, 0.0066, and 0.0061 with both. Layers without an FFN were never chosen
    (4,096 tokens of Fashion-MNIST to fit on dense hidden states, 2,048 held out, one run).

    Not where tokens have a range: in each of the first twelve layers of SmolLM2-135M, 96 experts, static slices lost
    more of the output than thresholds, at 50 % and at 75 % (4,600 tokens to fit, held-out error of the layer alone, 2
    cores of an Intel Xeon, 2026-11-26).

    Raises:
        InputError: there is none.
    """
    options, experts = prepared.options, prepared.layout.num_experts
    least, most = options.min_active or 1, options.max_active or experts
    actives = {round(share * experts) for share in (*SHARES, NEARLY_ALL)} & set(
        range(least, min(most, experts - 1) + 1)
    )
    # A quarter of the active ones if half are: half of those of a layer with few, a seventh where nearly all are.
    shared = -(-experts // 8)
    layouts = [
        adaptive(Layout(experts, shared, active), options)
        for active in sorted(actives)
        if active > shared and least <= active <= most
    ]
    layouts = [layout for layout in layouts if runs(prepared, layout)]
    if not layouts:
        raise InputError(f"{experts} experts leave no choice", "--experts takes 4 or more")
    static = [Layout(experts, layout.num_active, layout.num_active) for layout in layouts if not layout.is_adaptive]
    return [*layouts, *static]


def affordable_layouts(layouts: Sequence[Layout], budget: float) -> list[int]:
    """Indices of the layouts that meet the budget in every layer.

    Raises:
        UsageError: there is none.
    """
    affordable = [i for i, layout in enumerate(layouts) if layout.active_share <= budget + TOLERANCE]
    if not affordable:
        cheapest = min(layout.active_share for layout in layouts)
        raise UsageError(
            f"the smallest candidate keeps {cheapest:.3g} of the FFN active, the budget is {budget:.3g}",
            "raise --budget or take more --experts",
        )
    return affordable


def likely_layouts(layouts: Sequence[Layout], budget: float, *, by_layer: bool) -> list[Layout]:
    """The layouts that a search most likely chooses: cut layers keep an eighth less than the budget, the rest is dense.

    Where every layer has its own, also those around the budget.

    SmolLM2-135M in 96 experts, perplexity over dense on five unseen texts, geometric mean: at a budget of 0.75 all
    layers cut alike 1.243, with 60 of 96 active and 10 dense layers 1.180; at 0.5 1.750, with 36 and 6 layers 1.643
    (H200, 2026-11-26, `tests/benchmark_recovery.py`).

    Raises:
        UsageError: there is none under the budget.
    """
    # Static ones would take half of the time, and seldom win in models of text.
    affordable = [layouts[i] for i in affordable_layouts(layouts, budget) if not layouts[i].is_static]
    likely = min(affordable, key=lambda layout: abs(layout.active_share - (budget - LIKELY)))
    routed = [layout for layout in layouts if not layout.is_static]
    near = [layout for layout in routed if by_layer and abs(layout.active_share - budget) <= LIKELY + TOLERANCE]
    return near if likely in near else [likely, *near]
