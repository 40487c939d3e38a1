"""The plots of a report: perplexity against size, speed against batch size, and fine-tuning."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.benchmark.models.results import ModelBench, Speed
from moeify.benchmark.models.verdicts import fastest
from moeify.reporting.facts import active_parameters, quality_of
from moeify.reporting.plots import Axis, Plot, Point, Series, Shape
from moeify.reporting.reader import RunFolder
from moeify.reporting.tables import KINDS
from moeify.words import count, number, percent

if TYPE_CHECKING:
    from moeify.convert.search import Point as SearchPoint
    from moeify.convert.search import SearchResult

# Models of one kind have one colour; where there are several, these tell their lines apart, in turn.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "static": ("diamond", "circle", "dot"),
    "dense": ("square",),
    "moe": ("circle", "diamond", "dot"),
}
MILLION = 1e6
SIZE_AXIS = Axis("active parameters (million)")
RATIO_AXIS = Axis("perplexity / dense", "log", include=(1.0,))


def frontier(run: RunFolder) -> Plot | None:
    """Perplexity over the dense model's against active parameters; None without quality."""
    points: dict[str, list[Point]] = {kind: [] for kind in SHAPES}
    for model in run.bench.value.models:
        quality, active = quality_of(run.bench.value, model.name), active_parameters(model)
        if quality is not None:
            title = f"{model.name}: {count(active)} active, perplexity {number(quality.perplexity)}"
            interval = (quality.ratio_low, quality.ratio_high) if model.kind != "dense" else None
            points[model.kind].append(Point(active / MILLION, quality.ratio, title, model.name, interval))
    if not any(points.values()):
        return None
    words, series = "Down and to the left is better.", []
    if run.searched is not None:
        series = _search_points(run.searched.value)
        words += f" The search measured on a short check text ({run.searched.file})."
    series += [Series(KINDS[kind], kind, tuple(points[kind]), shapes[0], line=False) for kind, shapes in SHAPES.items()]
    drawn = tuple(one for one in series if one.points)
    return Plot("frontier", "Perplexity against active parameters", words, SIZE_AXIS, RATIO_AXIS, drawn)


def search_plot(result: "SearchResult") -> Plot:
    """The frontier of a search alone."""
    words = (
        "Down and to the left is better. Perplexity on the check text over the dense model's, which is "
        f"{number(result.dense_perplexity)}; {result.choice.strategy} chose at {percent(result.budget)}."
    )
    series = tuple(_search_points(result))
    return Plot("search", f"Search under a budget: {result.model}", words, SIZE_AXIS, RATIO_AXIS, series)


def _search_points(result: "SearchResult") -> list[Series]:
    """The frontier with the choice on it, and every layer cut alike."""

    def points(choices: "Iterable[SearchPoint]") -> tuple[Point, ...]:
        return tuple(
            Point(
                choice.active_parameters / MILLION,
                choice.perplexity / result.dense_perplexity,
                f"{choice.strategy}, {percent(choice.share)} of the FFN active, perplexity {number(choice.perplexity)}",
                f"chosen: {choice.strategy}" if choice is result.choice else "",
            )
            for choice in choices
            if math.isfinite(choice.perplexity)
        )

    by_size = {choice.active_parameters: choice for choice in (*result.frontier, result.choice)}
    return [
        Series("search, every layer alike", "other", points([result.uniform]), "diamond", line=False),
        Series("search, layers chosen", "search", points(by_size[size] for size in sorted(by_size)), "dot"),
    ]


def speeds(bench: ModelBench) -> list[Plot]:
    """Speed over the dense model's against batch size: one plot a phase and prompt length."""
    cases = sorted({(row.phase, row.prompt_tokens) for row in bench.speed if row.time_over_dense})
    return [_speed_plot(bench, phase, prompt) for phase, prompt in cases]


def _speed_plot(bench: ModelBench, phase: str, prompt: int) -> Plot:
    rows = [row for row in bench.speed if (row.phase, row.prompt_tokens) == (phase, prompt)]
    batches = sorted({row.batch for row in rows})
    lines: list[Series] = []
    for kind, shapes in SHAPES.items():
        names = [model.name for model in bench.models if model.kind == kind]
        for number_of_kind, name in enumerate(names):
            regimes = [fastest([row for row in rows if row.batch == batch], name) for batch in batches]
            timed = [row for row in regimes if row is not None and (kind == "dense" or row.time_over_dense)]
            lines.append(Series(name, kind, tuple(map(_speed_point, timed)), shapes[number_of_kind % len(shapes)]))
    return Plot(
        key=f"speed-{phase}-{prompt}",
        title=f"{phase.capitalize()}, {'after ' if phase == 'decode' else ''}{prompt:,} tokens",
        description="Higher is better; each model on the implementation that is fastest for it.",
        x=Axis("batch (sequences)", "log", ticks=tuple(map(float, batches))),
        y=Axis("speed / dense", "log", include=(1.0,)),
        series=tuple(one for one in lines if one.points),
    )


def _speed_point(row: Speed) -> Point:
    """A row as a multiple of the dense model's speed; it has a time."""
    title = f"{row.model}, batch {row.batch}: {row.implementation}, {number(row.tokens_per_second or 0.0)} tokens/s"
    low, high = row.time_over_dense_low, row.time_over_dense_high
    interval = (1 / high, 1 / low) if low and high else None
    return Point(row.batch, 1 / (row.time_over_dense or 1.0), title, interval=interval)


def training(run: RunFolder) -> Plot | None:
    """Perplexity on held-out text while checkpoints were trained, all in one; None if nobody measured it."""
    kinds = {Path(model.path).name: model.kind for model in run.bench.value.models}
    series: list[Series] = []
    for one in run.tuned:
        points: list[Point] = []
        for stage in one.stages:
            begin = points[-1].x if points else 0.0
            points += [
                Point(begin + tokens / MILLION, perplexity, f"{one.name}, {stage.stage}: {number(perplexity)}")
                for tokens, perplexity in one.curve(stage)
            ]
        kind = kinds.get(one.name, "moe")
        shapes = SHAPES[kind]
        shape = shapes[sum(other.style == kind for other in series) % len(shapes)]
        series += [Series(one.name, kind, tuple(points), shape)] if points else []
    axes = (Axis("tokens trained on (million)"), Axis("perplexity on held-out text", "log"))
    words = "Lower is better. All checkpoints on the same axes, so that a mixture can be held against its control."
    return Plot("training-curves", "Perplexity while training", words, *axes, tuple(series)) if series else None
