"""Whole models whose layers are cut alike: each token has as many experts as it needs, or all have as many.

Every layer is fitted on the dense hidden states, as the candidates of single layers are, and the check text goes on
through what was fitted. Thresholds are moved by one number a layer so that the check text's own tokens have as many
experts, in the mean, as others have of a number for all; what ran is counted.

Legend: T tokens, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moeify.cache import once
from moeify.convert.estimate import count_parameters
from moeify.convert.layer import fit_layer, num_active, settled
from moeify.convert.layouts import adaptive
from moeify.convert.prepare import Prepared
from moeify.convert.search_layouts import runs
from moeify.convert.search_points import Point
from moeify.convert.search_scores import OutputCheck
from moeify.layout import Layout
from moeify.models.inputs import Inputs
from moeify.options import Track
from moeify.plan import LayerPlan
from moeify.strategies import TOLERANCE

# The strategies in the table of a search.
AS_NEEDED, ALIKE = "as needed", "uniform"


@dataclass(frozen=True)
class Whole:
    """What a whole model loses on the check text.

    Args:
        active: experts that ran for a token, shared ones included, in the mean over layers and tokens.
        divergence, log_perplexity: as of `OutputChange`.
    """

    active: float
    divergence: float
    log_perplexity: float

    def point(self, prepared: Prepared, layout: Layout) -> Point:
        """As a choice of a search."""
        return Point(
            strategy=AS_NEEDED if layout.is_adaptive else ALIKE,
            share=self.active / layout.num_experts,
            active_parameters=count_parameters(replace(prepared, layout=layout).writer)[1],
            layout=layout,
            predicted=math.nan,
            divergence=self.divergence,
            perplexity=math.exp(self.log_perplexity),
        )


def layout_as_needed(prepared: Prepared, budget: float) -> Layout | None:
    """Every layer alike, and the budget is the mean of what tokens have.

    Returns:
        None where all tokens have as many, the options name a range of their own, or the budget leaves no choice.
    """
    options, experts = prepared.options, prepared.layout.num_experts
    active = math.floor(budget * experts + TOLERANCE)
    has_range = options.min_active is not None or options.max_active is not None
    if prepared.target.is_stock or has_range or options.mixing != "hard" or options.fusion != "sum" or active < 1:
        return None
    layout = adaptive(prepared.target.layout(experts, active=active), replace(options, max_active=experts))
    return layout if runs(prepared, layout) else None


def points_alike(
    prepared: Prepared,
    inputs: Tensor | Inputs,
    check: OutputCheck,
    layouts: Sequence[Layout],
    *,
    file: Path,
    track: Track[Any],
) -> list[Point]:
    """Whole models with all layers cut in one of these layouts.

    Args:
        prepared: the model and the methods.
        inputs: calibration blocks.
        check: compares outputs.
        layouts: of the models.
        file: keeps what was measured; it must belong to this very job.
        track: wraps the loop over layers.
    """

    def measure() -> list[dict[str, float]]:
        return [asdict(whole) for whole in _measure(prepared, inputs, check, layouts, track)]

    wholes = [Whole(**values) for values in once(file, measure)]
    return [whole.point(prepared, layout) for whole, layout in zip(wholes, layouts, strict=True)]


def comparison(needs: Point, other: Point) -> str:
    """Which of both loses less, and how much: a sentence."""
    words = "an own number for each layer" if other.layout.active_by_layer else "as many experts for every token"
    best, rest = sorted(
        [("as many experts as a token needs", needs), (words, other)], key=lambda choice: choice[1].divergence
    )
    losses = f"{best[1].divergence:.4f} at {best[1].share:.1%} of the FFNs, {rest[1].divergence:.4f} at"
    return f"{best[0]} loses less than {rest[0]}: {losses} {rest[1].share:.1%}, by the check text"


def _measure(
    prepared: Prepared, inputs: Tensor | Inputs, check: OutputCheck, layouts: Sequence[Layout], track: Track[Any]
) -> list[Whole]:
    """In one walk through the dense model."""
    stream, walks = prepared.stream(inputs), [check.stream() for _ in layouts]
    counts, num_layers = [0.0] * len(layouts), prepared.dense.num_layers
    for layer in track(range(num_layers), "cutting layers alike", num_layers):
        stream.reach(layer)
        ffn, inputs_TD = prepared.ffn(layer), stream.attend(layer)
        # Who chooses experts does not change which neurons they have.
        partitions: dict[Layout, LayerPlan] = {}
        for i, (layout, walk) in enumerate(zip(layouts, walks, strict=True)):
            fit, sizes = prepared.fit(layout), replace(layout, min_active=0, max_active=0)
            cut, _ = fit_layer(ffn, inputs_TD, fit, partitions.get(sizes))
            partitions[sizes] = LayerPlan(layer, cut.plan.labels_F, None)
            check_TD = walk.attend(layer)
            cut = settled(cut, check_TD, fit)
            counts[i] += num_active(cut, check_TD) / num_layers
            walk.advance(cut(check_TD))
        stream.advance(ffn(inputs_TD))
    changes = [check.compare(walk)[0] for walk in walks]
    return [
        Whole(active, change.divergence, change.log_perplexity) for active, change in zip(counts, changes, strict=True)
    ]
