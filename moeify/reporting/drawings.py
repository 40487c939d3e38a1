"""The plots of a report: perplexity against size, speed against batch size, and fine-tuning."""

from collections.abc import Iterable, Sequence

from moeify.benchmark.models.results import Model, ModelBench, Speed
from moeify.reporting import plots
from moeify.reporting.facts import active_parameters, quality_of
from moeify.reporting.plots import Axis, Plot, Point, Series, Shape
from moeify.reporting.reader import Compared, RunFolder, Searched, SearchPoint, Tuned
from moeify.reporting.words import count, factor, number, percent

# Methods of a comparison that lost more than this many times what the measured models lost are named, not drawn: they
# would press all others into one line.
DRAWN_UP_TO = 2.0
DRAWN_AT_LEAST = 3.0
SHAPES: dict[str, Shape] = {"dense": "square", "moe": "circle", "static": "diamond"}
# Models of one kind have one colour; where there are several, these tell their lines apart, in turn.
FURTHER_SHAPES: dict[str, tuple[Shape, ...]] = {
    "dense": ("square",),
    "moe": ("circle", "diamond", "dot"),
    "static": ("diamond", "circle", "dot"),
}
MILLION = 1e6


def frontier(run: RunFolder) -> Plot | None:
    """Perplexity over the dense model's against active parameters; None without quality."""
    bench = run.bench.value
    measured = [(model, quality_of(bench, model.name)) for model in bench.models]
    points = {
        kind: tuple(
            Point(
                active_parameters(model) / MILLION,
                quality.ratio.value,
                f"{model.name}: {count(active_parameters(model))} active, perplexity {number(quality.perplexity)}",
                model.name,
                (quality.ratio.low, quality.ratio.high) if model.kind != "dense" else None,
            )
            for model, quality in measured
            if quality is not None and model.kind == kind
        )
        for kind in SHAPES
    }
    if not any(points.values()):
        return None
    limit = max(DRAWN_AT_LEAST, DRAWN_UP_TO * max(point.y for some in points.values() for point in some))
    series, words = _further_points(run, limit)
    names = {"dense": "dense", "moe": "mixture of experts", "static": "pruned (static)"}
    series += [Series(names[kind], kind, points[kind], SHAPES[kind], line=False) for kind in ("static", "dense", "moe")]
    return plots.plot(
        "frontier",
        "Perplexity against active parameters",
        " ".join(["Down and to the left is better; every point against the dense model on its own text.", *words]),
        (Axis("active parameters (million)"), Axis("perplexity / dense", "log", include=(1.0,))),
        [one for one in series if one.points],
    )


def _further_points(run: RunFolder, limit: float) -> tuple[list[Series], list[str]]:
    """Points of a search and a comparison, and what has to be said about them."""
    series: list[Series] = []
    words: list[str] = []
    if run.searched is not None:
        series += _search_points(run.searched.value)
        words.append(f"The search measured on a short check text ({run.searched.file}).")
    if run.compared is not None:
        drawn, left_out = _method_points(run.compared.value, run.bench.value.models[0], limit)
        series += drawn
        words.append(
            f"Methods of the comparison ({run.compared.file}) use its own texts; "
            "their active parameters follow from the budget."
        )
        if left_out:
            words.append(f"Above {factor(limit)} and not drawn: {', '.join(left_out)}.")
    return series, words


def _search_points(searched: Searched) -> list[Series]:
    """The frontier with the choice on it, and every layer cut alike."""

    def points(found: Iterable[SearchPoint]) -> tuple[Point, ...]:
        return tuple(
            Point(
                point.active_parameters / MILLION,
                point.perplexity / searched.dense_perplexity,
                f"{point.strategy}, {percent(point.share)} of the FFN active",
            )
            for point in found
            if point.perplexity is not None
        )

    line = {point.active_parameters: point for point in (*searched.frontier, searched.choice)}
    ordered = sorted(line.values(), key=lambda point: point.active_parameters)
    return [
        Series("search, every layer alike", "other", points([searched.uniform]), "diamond", line=False),
        Series("search, layers chosen", "search", points(ordered), "dot"),
    ]


def _method_points(compared: Compared, dense: Model, limit: float) -> tuple[list[Series], list[str]]:
    """The methods beside the dense model, and those that are too far up to be drawn."""
    reference = next((row.perplexity for row in compared.rows if row.method == "dense"), None)
    ffn = dense.parts["ffn"].active_parameters if "ffn" in dense.parts else 0
    rest = active_parameters(dense) - ffn
    ours: list[Point] = []
    others: list[Point] = []
    left_out: list[str] = []
    for row in compared.rows:
        if row.method == "dense" or reference is None:
            continue
        title = f"{row.method} at {percent(row.budget)}"
        if row.perplexity is None or row.perplexity / reference > limit:
            left_out.append(title)
        else:
            point = Point((rest + row.budget * ffn) / MILLION, row.perplexity / reference, title)
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
        _speed_plot(bench, phase, prompt, [row for row in bench.speed if (row.phase, row.prompt_tokens) == key])
        for phase, prompt in cases
        for key in [(phase, prompt)]
    ]


def _speed_plot(bench: ModelBench, phase: str, prompt: int, rows: Sequence[Speed]) -> Plot:
    floors: list[Series] = []
    lines: list[Series] = []
    for model in sorted(bench.models, key=lambda model: ("static", "dense", "moe").index(model.kind)):
        fastest = _fastest(model, rows)
        if not fastest:
            continue
        shapes = FURTHER_SHAPES[model.kind]
        shape = shapes[sum(one.style == model.kind for one in lines) % len(shapes)]
        lines.append(Series(model.name, model.kind, tuple(map(_speed_point, fastest)), shape))
        bounds = tuple(
            Point(row.batch, row.time_over_floor / (row.time_over_dense or 1.0), f"{model.name}, batch {row.batch}")
            for row in fastest
            if row.time_over_floor
        )
        floors += [Series("floor of this machine", f"{model.kind} floor", bounds, None)] if bounds else []
    batches = sorted({row.batch for row in rows})
    return plots.plot(
        f"speed-{phase}-{prompt}",
        f"{phase.capitalize()}, {'after ' if phase == 'decode' else ''}{prompt:,} tokens",
        "Higher is better; each model on the implementation that is fastest for it."
        + (" Dashed: what reading the weights and the arithmetic would allow." if floors else ""),
        (
            Axis("batch (sequences)", "log", ticks=tuple(float(batch) for batch in batches)),
            Axis("speed / dense", "log", include=(1.0,)),
        ),
        [*floors, *lines],
    )


def _speed_point(row: Speed) -> Point:
    """A row as a multiple of the dense model's speed; it has a time."""
    title = f"{row.model}, batch {row.batch}: {row.implementation}, {number(row.tokens_per_second or 0.0)} tokens/s"
    if row.time_over_dense is None:
        return Point(row.batch, 1.0, title)
    low, high = row.time_over_dense_low, row.time_over_dense_high
    interval = (1 / high, 1 / low) if low and high else None
    return Point(row.batch, 1 / row.time_over_dense, title, interval=interval)


def _fastest(model: Model, rows: Sequence[Speed]) -> list[Speed]:
    """For each batch size the model's fastest row; of the dense model itself, which is the measure, any with a time."""
    best: dict[int, Speed] = {}
    for row in rows:
        if row.model != model.name or not row.ms_p50 or (row.time_over_dense is None and model.kind != "dense"):
            continue
        if row.batch not in best or row.ms_p50 < (best[row.batch].ms_p50 or 0.0):
            best[row.batch] = row
    return [best[batch] for batch in sorted(best)]


def training(key: str, file: str, tuned: Tuned) -> Plot | None:
    """Perplexity on held-out text while a checkpoint was trained, stage after stage; None if no stage measured it."""
    series: list[Series] = []
    begin = 0.0
    styles = ("static", "moe", "dense")
    for stage in tuned.stages:
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
    if len(series) == 1:
        series = [Series(series[0].name, "moe", series[0].points, "dot")]
    title = f"Fine-tuning: {file}"
    axes = (Axis("step"), Axis("perplexity on held-out text"))
    return plots.plot(key, title, "Lower is better.", axes, series)
