"""The plots of a report: perplexity against size, speed against batch size, and fine-tuning."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.benchmark.models.results import Verdict
from moeify.reporting.facts import Facts, active_parameters, quality_of
from moeify.reporting.plots import Axis, Plot, Point, Series, Shape
from moeify.reporting.reader import RunFolder
from moeify.reporting.tables import KINDS, speed
from moeify.words import count, number, percent

if TYPE_CHECKING:
    from moeify.convert.search import SearchResult
    from moeify.convert.search_points import Point as SearchPoint

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
                choice.perplexity / (result.dense_perplexity or math.nan),
                f"{choice.strategy}, {percent(choice.share)} of the FFN active, perplexity {number(choice.perplexity)}",
                f"chosen: {choice.strategy}" if choice is result.choice else "",
            )
            for choice in choices
            if math.isfinite(choice.perplexity)
        )

    by_size = {choice.active_parameters: choice for choice in (*result.frontier, result.choice)}
    return [
        Series("search, every layer alike", "other", points([result.uniform]), "diamond", line=False),
        Series("layers dropped alone", "static", points([result.by_depth] if result.by_depth else []), line=False),
        Series("search, layers chosen", "search", points(by_size[size] for size in sorted(by_size)), "dot"),
    ]


def speeds(all_facts: Sequence[Facts]) -> list[Plot]:
    """Speed over the dense model's against batch size: one plot a phase and prompt length, of the table's rows."""
    cases = sorted({(row.phase, row.prompt_tokens) for facts in all_facts for row in facts.in_transformers})
    return [_speed_plot(all_facts, phase, prompt) for phase, prompt in cases]


def _speed_plot(all_facts: Sequence[Facts], phase: str, prompt: int) -> Plot:
    lines: list[Series] = []
    for facts in all_facts:
        rows = [row for row in facts.in_transformers if (row.phase, row.prompt_tokens) == (phase, prompt)]
        lines += [_line(facts.model.name, facts.model.kind, map(_speed_point, rows), lines)] if rows else []
    batches = sorted({point.x for line in lines for point in line.points})
    dense = Series("dense", "dense", tuple(Point(batch, 1.0, "dense") for batch in batches), "square")
    return Plot(
        key=f"speed-{phase}-{prompt}",
        title=f"{phase.capitalize()}, {'after ' if phase == 'decode' else ''}{prompt:,} tokens",
        description="Higher is better; each model on the implementation that is fastest for it.",
        x=Axis("batch (sequences)", "log", ticks=tuple(batches)),
        y=Axis("speed / dense", "log", include=(1.0,)),
        series=(dense, *lines[::-1]),
    )


def _speed_point(row: Verdict) -> Point:
    value = speed(row)
    title = f"{row.model}, batch {row.batch}: {row.implementation}, {row.outcome}"
    return Point(float(row.batch), value.value, title, interval=(value.low, value.high))


def _line(name: str, kind: str, points: Iterable[Point], others: Sequence[Series]) -> Series:
    """In the colour of its kind, with marks that tell it from others of that kind."""
    shapes = SHAPES[kind]
    return Series(name, kind, tuple(points), shapes[sum(other.style == kind for other in others) % len(shapes)])


def training(run: RunFolder) -> Plot | None:
    """Perplexity on held-out text while checkpoints were trained, all in one; None if nobody measured it."""
    kinds = {Path(model.path).name: model.kind for model in run.bench.value.models}
    series: list[Series] = []
    for one in run.tuned:
        points: list[Point] = []
        for stage in one.stages:
            begin, title = points[-1].x if points else 0.0, f"{one.name}, {stage.stage}"
            points += [Point(begin + tokens / MILLION, value, title) for tokens, value in one.curve(stage)]
        series += [_line(one.name, kinds.get(one.name, "moe"), points, series)] if points else []
    axes = (Axis("tokens trained on (million)"), Axis("perplexity on held-out text", "log"))
    words = "Lower is better. All checkpoints on the same axes, so that a mixture can be held against its control."
    return Plot("training-curves", "Perplexity while training", words, *axes, tuple(series)) if series else None
