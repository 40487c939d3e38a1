"""Experts at work: load of every expert, the router against the best choice, experts that work together, their tokens.

Co-activation is one letter a pair, drawn by the page for the layer that is looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeify.benchmark.models.results import LayerExperts, ModelBench
from moeify.reporting.plots import Axis, Plot, Point, Series
from moeify.words import factor, percent

# Upper ends of the shades of load, relative to an even one; the last shade has none.
LOAD_SHADES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
# One letter a pair stands for log2(observed / independent) in steps of 1/10, from -3.1 to 3.1.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-"
STEP = 0.1
MIDDLE = len(LETTERS) // 2
# An expert that gets less than this share of an even load is all but unused.
UNUSED = 0.1
# Stand-ins for characters that cannot be seen; the last two blanks keep a token from looking empty.
VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\u00a0": "\u237d"}


@dataclass(frozen=True)
class LayerPart:
    """One layer of a model.

    Args:
        layer: its index.
        load: of each expert the shade and the share of all choices, in percent.
        pairs: one letter for each pair of experts i < j, row by row.
        preferences: of each expert its share of all choices and its tokens.
    """

    layer: int
    load: tuple[tuple[int, str], ...]
    pairs: str
    preferences: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class ExpertsPart:
    """All about the experts of one model."""

    key: str
    model: str
    num_experts: int
    layers: tuple[LayerPart, ...]
    load_words: str
    gap: Plot

    @property
    def pairs(self) -> dict[int, str]:
        return {layer.layer: layer.pairs for layer in self.layers}


def experts_parts(bench: ModelBench) -> list[ExpertsPart]:
    """One a model whose experts were measured; all layers of it have as many experts."""
    return [
        ExpertsPart(key, model, len(layers[0].load), tuple(map(_layer, layers)), _load_words(layers), _gap(key, layers))
        for index, (model, layers) in enumerate(bench.experts.items())
        for key in [f"experts-{index}"]
        if layers
    ]


def _layer(layer: LayerExperts) -> LayerPart:
    even = 1 / len(layer.load)
    return LayerPart(
        layer=layer.layer,
        load=tuple((sum(share / even > limit for limit in LOAD_SHADES), f"{share * 100:.1f}") for share in layer.load),
        pairs=encode_pairs(layer.coactivation),
        preferences=tuple(
            (percent(share), tuple(map(visible, tokens)))
            for share, tokens in zip(layer.load, layer.top_tokens, strict=True)
        ),
    )


def encode_pairs(coactivation: Sequence[Sequence[float]]) -> str:
    """One letter for each pair of experts i < j, row by row."""
    return "".join(LETTERS[_level(excess)] for i, row in enumerate(coactivation) for excess in row[i + 1 :])


def _level(excess: float) -> int:
    """Of observed over independent, minus one."""
    if excess <= -1:
        return 0
    return min(max(MIDDLE + round(math.log2(1 + excess) / STEP), 0), len(LETTERS) - 1)


def visible(token: str) -> str:
    """A token's text with its blanks visible; control characters and halves of a code point become U+FFFD."""
    text = "".join(VISIBLE.get(letter, letter) for letter in token)
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text) or "\u2205"


def _load_words(layers: Sequence[LayerExperts]) -> str:
    relatives = [share * len(layer.load) for layer in layers for share in layer.load]
    unused = sum(relative < UNUSED for relative in relatives)
    return (
        f"The busiest expert gets {factor(max(relatives))} times an even share, the idlest {min(relatives):.2f}. "
        f"{unused} of {len(relatives)} experts are all but unused (under {percent(UNUSED)} of an even share)."
    )


def _gap(key: str, layers: Sequence[LayerExperts]) -> Plot:
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

    return Plot(
        f"{key}-gap",
        "How near the router comes to the best choice of experts",
        words,
        Axis("layer"),
        Axis("share of the best choice", include=(1.0,)),
        (
            Series("best possible choice", "dense", line([1.0] * len(layers), "best"), shape=None),
            Series("random choice", "static", line([layer.random_capture for layer in layers], "random"), shape=None),
            Series("router", "moe", line([layer.oracle_capture for layer in layers], "router"), "dot"),
        ),
    )
