"""What the experts do, as drawings: load of every expert, what the router misses, which experts work together.

A heat map has one path for each of a few shades, which takes fewer bytes than a rectangle a cell. Co-activation is one
letter a pair, drawn by the page for the layer that is looked at.

Legend: E routed experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeify.benchmark.models.results import LayerExperts
from moeify.reporting import plots
from moeify.reporting.plots import Axis, Plot, Point, Series
from moeify.reporting.words import factor, percent, token

# Upper ends of the shades of load, relative to an even one; the last shade has none.
LOAD_SHADES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
# One letter a pair stands for log2(observed / independent) in steps of 1/10, from -3.1 to 3.1.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-"
STEP = 0.1
MIDDLE = len(LETTERS) // 2
# An expert that gets less than this share of an even load is all but unused.
UNUSED = 0.1
SIDE = 360.0
DISPLAY_SCALE = 1.1
# Of few experts or layers the cells would be posters.
MAX_CELL = 36.0


@dataclass(frozen=True)
class HeatMap:
    """Load of every expert.

    Args:
        key: unique in the page.
        description: for those who cannot see it.
        width, height: of the cells, in the drawing's units; cell_width and cell_height of one.
        shades: one path each, empty if no cell has it.
        layers: index of each row; num_experts columns.
        rows: shares of each layer, in percent.
    """

    key: str
    description: str
    width: float
    height: float
    cell_width: float
    cell_height: float
    shades: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: int
    rows: tuple[tuple[str, ...], ...]

    @property
    def display_width(self) -> int:
        """CSS pixels at which labels have the size of the page's small text."""
        return round(DISPLAY_SCALE * (self.width + 36))


@dataclass(frozen=True)
class Preferences:
    """What the experts of a layer prefer: for each its load and tokens."""

    layer: int
    experts: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class ExpertsPart:
    """All about the experts of one model."""

    key: str
    model: str
    num_experts: int
    load: HeatMap
    load_words: str
    gap: Plot
    gap_words: str
    pairs: dict[str, str]
    preferences: tuple[Preferences, ...]


def experts_part(key: str, model: str, layers: Sequence[LayerExperts]) -> ExpertsPart:
    """Drawings of one model; `layers` is not empty."""
    gap, gap_words = _gap(key, layers)
    load, load_words = _load(key, layers)
    return ExpertsPart(
        key=key,
        model=model,
        num_experts=len(layers[0].load),
        load=load,
        load_words=load_words,
        gap=gap,
        gap_words=gap_words,
        pairs={str(layer.layer): encode_pairs(layer.coactivation) for layer in layers},
        preferences=tuple(
            Preferences(
                layer.layer,
                tuple(
                    (percent(share), tuple(map(token, tokens)))
                    for share, tokens in zip(layer.load, layer.top_tokens, strict=True)
                ),
            )
            for layer in layers
        ),
    )


def encode_pairs(coactivation: Sequence[Sequence[float]]) -> str:
    """One letter for each pair of experts i < j, row by row."""
    return "".join(
        LETTERS[_level(coactivation[i][j])] for i in range(len(coactivation)) for j in range(i + 1, len(coactivation))
    )


def _level(excess: float) -> int:
    """Of observed over independent, minus one."""
    if excess <= -1:
        return 0
    return min(max(MIDDLE + round(math.log2(1 + excess) / STEP), 0), len(LETTERS) - 1)


def _load(key: str, layers: Sequence[LayerExperts]) -> tuple[HeatMap, str]:
    num_experts = max(len(layer.load) for layer in layers)
    cell_width = min(SIDE / num_experts, MAX_CELL)
    cell_height = min(SIDE / len(layers), MAX_CELL)
    paths = [""] * (len(LOAD_SHADES) + 1)
    for row, layer in enumerate(layers):
        for column, share in enumerate(layer.load):
            relative = share * len(layer.load)
            shade = sum(relative > limit for limit in LOAD_SHADES)
            corner = f"M{column * cell_width:.5g} {row * cell_height:.5g}"
            paths[shade] += f"{corner}h{cell_width:.4g}v{cell_height:.4g}h-{cell_width:.4g}z"
    relatives = [share * len(layer.load) for layer in layers for share in layer.load]
    unused = sum(relative < UNUSED for relative in relatives)
    words = (
        f"The busiest expert gets {factor(max(relatives))} times an even share, the idlest {min(relatives):.2f}. "
        f"{unused} of {len(relatives)} experts are all but unused (under {percent(UNUSED)} of an even share)."
    )
    heat = HeatMap(
        key=f"{key}-load",
        description=f"Load of {num_experts} experts in {len(layers)} layers. {words}",
        width=round(cell_width * num_experts, 1),
        height=round(cell_height * len(layers), 1),
        cell_width=cell_width,
        cell_height=cell_height,
        shades=tuple(paths),
        layers=tuple(layer.layer for layer in layers),
        num_experts=num_experts,
        rows=tuple(tuple(f"{share * 100:.1f}" for share in layer.load) for layer in layers),
    )
    return heat, words


def _gap(key: str, layers: Sequence[LayerExperts]) -> tuple[Plot, str]:
    """How near the router comes to the best possible choice."""
    router = sum(layer.oracle_capture for layer in layers) / len(layers)
    chance = sum(layer.random_capture for layer in layers) / len(layers)
    worst = min(layers, key=lambda layer: layer.oracle_capture)
    words = (
        f"On average the router's experts add {percent(router)} of what the best choice would add; "
        f"a random choice adds {percent(chance)}. Furthest from the best: layer {worst.layer}, "
        f"{percent(worst.oracle_capture)}."
    )

    def line(values: Sequence[float], what: str) -> tuple[Point, ...]:
        return tuple(
            Point(layer.layer, value, f"layer {layer.layer}: {what} {percent(value)}")
            for layer, value in zip(layers, values, strict=True)
        )

    drawn = plots.plot(
        f"{key}-gap",
        "How near the router comes to the best choice of experts",
        words,
        (Axis("layer"), Axis("share of the best choice", include=(1.0,))),
        [
            Series("best possible choice", "dense", line([1.0] * len(layers), "best"), shape=None),
            Series("random choice", "static", line([layer.random_capture for layer in layers], "random"), shape=None),
            Series("router", "moe", line([layer.oracle_capture for layer in layers], "router"), "dot"),
        ],
    )
    return drawn, words
