"""The plots of a report: perplexity against size, speed against batch size, and fine-tuning."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moeify.benchmark.models.results import Model, ModelBench, Speed
from moeify.benchmark.models.verdicts import fastest
from moeify.reporting.facts import active_parameters, quality_of
from moeify.reporting.plots import Axis, Plot, Point, Series, Shape
from moeify.reporting.reader import RunFolder, Source
from moeify.reporting.tables import KINDS
from moeify.words import count, factor, number, percent

if TYPE_CHECKING:
    from moeify.check.compare import Comparison
    from moeify.convert.search import Point as SearchPoint
    from moeify.convert.search import SearchResult
    from moeify.training.finetune import FinetuneHistory

# Methods of a comparison that lost more than this many times what the measured models lost are named, not drawn: they
# would press all others into one line.
DRAWN_UP_TO = 2.0
DRAWN_AT_LEAST = 3.0
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
    limit = max(DRAWN_AT_LEAST, DRAWN_UP_TO * max(point.y for some in points.values() for point in some))
    series, words = _further_points(run, limit)
    series += [Series(KINDS[kind], kind, tuple(points[kind]), shapes[0], line=False) for kind, shapes in SHAPES.items()]
    words.insert(0, "Down and to the left is better; every point against the dense model on its own text.")
    drawn = tuple(one for one in series if one.points)
    return Plot("frontier", "Perplexity against active parameters", " ".join(words), SIZE_AXIS, RATIO_AXIS, drawn)


def _further_points(run: RunFolder, limit: float) -> tuple[list[Series], list[str]]:
    """Points of a search and a comparison, and sentences about them."""
    series: list[Series] = []
    words: list[str] = []
    if run.searched is not None:
        series += _search_points(run.searched.value)
        words.append(f"The search measured on a short check text ({run.searched.file}).")
    if run.compared is not None:
        methods, left_out = _method_points(run.compared.value, run.bench.value.models[0], limit)
        series += methods
        words.append(
            f"Methods of the comparison ({run.compared.file}) use its own texts; "
            "their active parameters follow from the budget."
        )
        if left_out:
            words.append(f"Above {factor(limit)} and not drawn: {', '.join(left_out)}.")
    return series, words


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


def _method_points(compared: "Comparison", dense: Model, limit: float) -> tuple[list[Series], list[str]]:
    """The methods beside the dense model, and those that are too far up to be drawn."""
    reference = next((row.perplexity for row in compared.rows if row.method == "dense"), None)
    ffn = dense.parts["ffn"].active_parameters if "ffn" in dense.parts else 0
    ours: list[Point] = []
    others: list[Point] = []
    left_out: list[str] = []
    for row in compared.rows:
        if row.method == "dense" or reference is None:
            continue
        title = f"{row.method} at {percent(row.budget)}"
        if not row.perplexity / reference <= limit:
            left_out.append(title)
        else:
            active = active_parameters(dense) - (1 - row.budget) * ffn
            point = Point(active / MILLION, row.perplexity / reference, title)
            (ours if row.method.startswith("moeify") else others).append(point)
    series = [
        Series("comparison, other methods", "other", tuple(others), "dot", line=False),
        Series("comparison, moeify", "ours", tuple(ours), "dot", line=False),
    ]
    return series, left_out


def speeds(bench: ModelBench) -> list[Plot]:
    """Speed over the dense model's against batch size: one plot a phase and prompt length."""
    cases = sorted({(row.phase, row.prompt_tokens) for row in bench.speed if row.time_over_dense})
    return [
        _speed_plot(bench, phase, prompt, [row for row in bench.speed if (row.phase, row.prompt_tokens) == case])
        for case in cases
        for phase, prompt in [case]
    ]


def _speed_plot(bench: ModelBench, phase: str, prompt: int, rows: Sequence[Speed]) -> Plot:
    batches = sorted({row.batch for row in rows})
    floors: list[Series] = []
    lines: list[Series] = []
    for kind, shapes in SHAPES.items():
        names = [model.name for model in bench.models if model.kind == kind]
        for number_of_kind, name in enumerate(names):
            regimes = [fastest([row for row in rows if row.batch == batch], name) for batch in batches]
            timed = [row for row in regimes if row is not None and (kind == "dense" or row.time_over_dense)]
            lines.append(Series(name, kind, tuple(map(_speed_point, timed)), shapes[number_of_kind % len(shapes)]))
            bounds = tuple(
                Point(row.batch, row.time_over_floor / (row.time_over_dense or 1.0), f"{name}, batch {row.batch}")
                for row in timed
                if row.time_over_floor
            )
            floors.append(Series("floor of this machine", f"{kind} floor", bounds, None))
    words = "Higher is better; each model on the implementation that is fastest for it."
    if any(floor.points for floor in floors):
        words += " Dashed: what reading the weights and the arithmetic would allow."
    return Plot(
        key=f"speed-{phase}-{prompt}",
        title=f"{phase.capitalize()}, {'after ' if phase == 'decode' else ''}{prompt:,} tokens",
        description=words,
        x=Axis("batch (sequences)", "log", ticks=tuple(map(float, batches))),
        y=Axis("speed / dense", "log", include=(1.0,)),
        series=tuple(one for one in (*floors, *lines) if one.points),
    )


def _speed_point(row: Speed) -> Point:
    """A row as a multiple of the dense model's speed; it has a time."""
    title = f"{row.model}, batch {row.batch}: {row.implementation}, {number(row.tokens_per_second or 0.0)} tokens/s"
    low, high = row.time_over_dense_low, row.time_over_dense_high
    interval = (1 / high, 1 / low) if low and high else None
    return Point(row.batch, 1 / (row.time_over_dense or 1.0), title, interval=interval)


def training(key: str, source: "Source[FinetuneHistory]") -> Plot | None:
    """Perplexity on held-out text while a checkpoint was trained, stage after stage; None if no stage measured it."""
    series: list[Series] = []
    begin = 0.0
    styles = ("moe", "static", "dense")
    for stage in source.value.stages:
        points = tuple(
            Point(begin + float(entry["step"]), float(entry["eval_perplexity"]), f"{stage.stage}, step {entry['step']}")
            for entry in stage.history
            if "eval_perplexity" in entry and "step" in entry
        )
        if points:
            series.append(Series(stage.stage, styles[len(series) % len(styles)], points, "dot"))
            begin = points[-1].x
    if not series:
        return None
    axes = (Axis("step"), Axis("perplexity on held-out text"))
    return Plot(key, f"Fine-tuning: {source.file}", "Lower is better.", *axes, tuple(series))
