"""Experts at work: load of every expert, the router against the best choice, tokens and texts that each prefers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeify.benchmark.models.results import LayerExperts, ModelBench
from moeify.reporting.plots import Axis, Plot, Point, Series
from moeify.reporting.tables import Table, preferences
from moeify.words import factor, percent

# An expert that gets less than this share of an even load is all but unused.
UNUSED = 0.1
# Stand-ins for characters that cannot be seen; the last two blanks keep a token from looking empty.
VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\u00a0": "\u237d"}


@dataclass(frozen=True)
class ExpertsPart:
    """All about the experts of one model.

    Args:
        model: its name.
        gap: the router against the best choice.
        texts: which experts each text prefers; None with one text.
        tokens: of each layer its index, and of each expert its share of all choices and its tokens.
    """

    model: str
    gap: Plot
    texts: Table | None
    tokens: tuple[tuple[int, tuple[tuple[str, tuple[str, ...]], ...]], ...]


def experts_parts(bench: ModelBench) -> list[ExpertsPart]:
    """One a model whose experts were measured; all layers of it have as many experts."""
    return [
        ExpertsPart(
            model,
            _gap(f"experts-{index}", layers),
            preferences(f"experts-{index}", layers),
            tuple((layer.layer, _tokens(layer)) for layer in layers),
        )
        for index, (model, layers) in enumerate(bench.experts.items())
        if layers
    ]


def _tokens(layer: LayerExperts) -> tuple[tuple[str, tuple[str, ...]], ...]:
    experts = zip(layer.load, layer.top_tokens, strict=True)
    return tuple((percent(share), tuple(map(visible, tokens))) for share, tokens in experts)


def visible(token: str) -> str:
    """A token's text with its blanks visible; control characters and halves of a code point become U+FFFD."""
    text = "".join(VISIBLE.get(letter, letter) for letter in token)
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text) or "\u2205"


def _line(name: str, layers: Sequence[LayerExperts], value: Callable[[LayerExperts], float], style: str) -> Series:
    points = [Point(layer.layer, value(layer), f"layer {layer.layer}: {value(layer):.2f}") for layer in layers]
    return Series(name, style, tuple(points), "dot" if style == "moe" else None)


def _load_words(layers: Sequence[LayerExperts]) -> str:
    relative = [share * len(layer.load) for layer in layers for share in layer.load]
    unused = sum(share < UNUSED for share in relative)
    return (
        f"The busiest expert gets {factor(max(relative))} times an even share, the idlest {min(relative):.2f}; "
        f"{unused} of {len(relative)} experts are all but unused (under {percent(UNUSED)} of an even share)."
    )


def _gap(key: str, layers: Sequence[LayerExperts]) -> Plot:
    """How near the router comes to the best possible choice."""
    router = sum(layer.oracle_capture for layer in layers) / len(layers)
    chance = sum(layer.random_capture for layer in layers) / len(layers)
    worst = min(layers, key=lambda layer: layer.oracle_capture)
    words = (
        f"On average the router's experts add {percent(router)} of what the best choice would add; "
        f"a random choice adds {percent(chance)}. Furthest from the best: layer {worst.layer}, "
        f"{percent(worst.oracle_capture)}. {_load_words(layers)}"
    )
    series = (
        _line("best possible choice", layers, lambda _: 1.0, "dense"),
        _line("random choice", layers, lambda layer: layer.random_capture, "static"),
        _line("router", layers, lambda layer: layer.oracle_capture, "moe"),
    )
    axes = (Axis("layer"), Axis("share of the best choice", include=(1.0,)))
    return Plot(f"{key}-gap", "How near the router comes to the best choice of experts", words, *axes, series)
