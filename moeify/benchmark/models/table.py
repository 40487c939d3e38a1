"""A model benchmark as tables: compression, quality, speed, other engines, experts, an earlier run, verdicts last."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moeify.benchmark.engines import table as engines
from moeify.benchmark.grid import Grid
from moeify.benchmark.models.results import PARTS, Model, ModelBench, Speed, Verdict
from moeify.words import between, fixed, listing

DENSE = "dense"
# So many models stand beside the dense one in a table of sizes: more do not fit a terminal.
BESIDE = 2
# Columns that are no numbers.
WORDS = ("size", "model", "static", "text", "task", "on", "row", "what", "")


def grids(result: ModelBench) -> list[Grid]:
    """In the order in which they are shown; those without lines are left out."""
    dense, *others = result.models
    sizes = [_compression([dense, *others[first : first + BESIDE]]) for first in range(0, len(others), BESIDE)]
    quality = [*_quality(result), _against_static(result), scores(result), tasks(result)]
    measured = [*quality, *_speed(result), *engines.grids(result), _experts(result)]
    tables = [*sizes, *measured, _changes(result)]
    return [grid for grid in tables if grid.lines]


def verdict_lines(result: ModelBench) -> list[str]:
    """One a model and regime."""
    return [
        f"{row.model}, {_regime(row)}: {row.outcome}, {row.time_over_dense:.2f} of the dense model's time"
        + (f" on {row.implementation}" if row.implementation != DENSE else "")
        + f"; {row.why}"
        for row in result.verdicts
    ]


def notes(result: ModelBench) -> list[str]:
    """Where it was measured, what could not be, and what an earlier run had."""
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in result.versions.items())
    count = result.machine.get("threads")
    threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
    lines = [f"{result.machine['device']}{threads}, {result.dtype}, {result.date[:10]}, {packages}"]
    if result.ceilings:
        bandwidth = result.ceilings.copy_bytes_per_second / 1e9
        rate = result.ceilings.matmul_flops_per_second / 1e12
        lines.append(f"measured in this run: copy {bandwidth:,.1f} GB/s, matrix product {rate:,.2f} TFLOP/s")
    lines += [
        f"{model.name} was calibrated on {listing(model.calibrated_on)}"
        for model in result.models
        if model.calibrated_on
    ]
    lines += [
        f"{model.name}: memory not known, {model.memory_reason}" for model in result.models if model.memory_reason
    ]
    lines += [f"{_row_name(row)}: {row.reason}" for row in result.speed if row.reason]
    lines += engines.notes(result)
    if result.regressions:
        lines += [f"only in {result.regressions.baseline}: {name}" for name in result.regressions.missing]
        worse = len(result.regressions.worse)
        lines.append(
            f"{worse} of {len(result.regressions.changes)} numbers worse than in {result.regressions.baseline} by more "
            f"than {result.regressions.threshold:g} and the noise"
        )
    return lines


def _compression(models: Sequence[Model]) -> Grid:
    """A line a size: the dense model's, then each other one's and its ratio."""
    columns = ["size", models[0].name]
    for model in models[1:]:
        columns += [model.name, "ratio"]
    lines = []
    for label, values in _sizes(models):
        if any(value is not None for value in values):
            dense, line = values[0], [label, fixed(values[0], 3)]
            for value in values[1:]:
                line += [fixed(value, 3), "" if not dense or value is None else fixed(value / dense, 3)]
            lines.append(tuple(line))
    lines.append(("experts", "", *(cell for model in models[1:] for cell in (_layout(model), ""))))
    return Grid("compression", tuple(columns), tuple(lines), WORDS)


def _sizes(models: Sequence[Model]) -> Iterator[tuple[str, list[float | None]]]:
    """In millions and MB."""

    def total(name: str) -> list[float | None]:
        return [sum(getattr(part, name) for part in model.parts.values()) / 1e6 for model in models]

    decodes = any(total("bytes_per_decoded_token"))
    yield "layers, as keys and values" if decodes else "layers", [float(model.num_layers) for model in models]
    yield "parameters, M", total("parameters")
    yield "active parameters, M", total("active_parameters")
    yield "FLOPs a token, M", total("flops_per_token")
    for part in PARTS:
        yield (
            f"  {part}",
            [model.parts[part].flops_per_token / 1e6 if part in model.parts else None for model in models],
        )
    if decodes:
        yield "read a decoded token, MB", total("bytes_per_decoded_token")
    yield "on disk, MB", [model.bytes_on_disk / 1e6 for model in models]
    for label, name in (
        ("peak memory loading, MB", "load_peak_memory_bytes"),
        ("peak memory, MB", "peak_memory_bytes"),
    ):
        sizes = [getattr(model, name) for model in models]
        yield label, [None if value is None else value / 1e6 for value in sizes]


def _layout(model: Model) -> str:
    if model.num_experts is None:
        return f"{model.active_share:.0%} of the FFN"
    return model.experts_words


def _quality(result: ModelBench) -> Iterator[Grid]:
    """One table a text."""
    for data in dict.fromkeys(row.data for row in result.quality):
        rows = [row for row in result.quality if row.data == data]
        lines = tuple(
            (
                row.model,
                fixed(row.perplexity, 2),
                fixed(row.ratio, 3),
                between(row.ratio_low, row.ratio_high, 3),
                fixed(row.kl_nats, 4),
                between(row.kl_low, row.kl_high, 3),
                f"{row.top1_agreement:.1%}",
            )
            for row in rows
        )
        title = f"quality on {Path(data).name}, {rows[0].num_tokens:,} tokens in blocks of {result.context}"
        columns = ("model", "perplexity", "ratio", "95 %", "KL, nats", "95 %", "top 1")
        yield Grid(title, columns, lines, WORDS, explained=("KL", "top 1", "95 %"))


def _against_static(result: ModelBench) -> Grid:
    """Perplexity over a static model's, from the same blocks."""
    lines = tuple(
        (row.model, control, Path(row.data).name, fixed(ratio.value, 3), between(ratio.low, ratio.high, 3))
        for row in result.quality
        for control, ratio in row.over_static.items()
    )
    return Grid(
        "perplexity over a static model's", ("model", "static", "text", "ratio", "95 %"), lines, WORDS, num_keys=2
    )


def tasks(result: ModelBench) -> Grid:
    """Scores, and their difference to the dense model's on the same questions."""
    lines = tuple(
        (
            f"{Path(row.task).name} {row.metric}",
            row.model,
            fixed(row.score, 3),
            between(row.score_low, row.score_high, 3),
            "" if row.model == DENSE else f"{row.difference:+.3f}",
            "" if row.model == DENSE else f"{row.difference_low:+.3f} {row.difference_high:+.3f}",
        )
        for row in sorted(result.tasks, key=lambda row: (row.task, row.metric))
    )
    counts = {f"{row.num_questions:,} of {Path(row.task).name}": None for row in result.tasks}
    title = f"tasks, questions: {', '.join(counts)}"
    columns = ("task", "model", "score", "95 %", "- dense", "95 %")
    return Grid(title, columns, lines, WORDS, num_keys=2, explained=("acc",))


def scores(result: ModelBench) -> Grid:
    """Of models that write no text, by their own measure."""
    lines = tuple(
        (Path(row.data).name, row.measure, row.model, f"{row.value:.4f}", f"{row.num_examples:,}")
        for row in sorted(result.scores, key=lambda row: (row.data, row.measure))
    )
    return Grid("quality", ("text", "task", "model", "score", "examples"), lines, WORDS, num_keys=3)


def _speed(result: ModelBench) -> Iterator[Grid]:
    """One table a regime, of rows that have a time; the reasons of others are notes."""
    floor = ("/floor",) if result.ceilings else ()
    for regime in dict.fromkeys(_regime(row) for row in result.speed):
        lines, examples = [], regime.startswith("forward")
        for row in result.speed:
            if _regime(row) == regime and row.ms_p50 is not None:
                cells = (
                    row.model,
                    row.implementation,
                    fixed(row.ms_p50, 2),
                    fixed(row.examples_per_second if examples else row.tokens_per_second, 1),
                    fixed(row.time_over_dense, 2),
                    between(row.time_over_dense_low, row.time_over_dense_high, 2),
                    "" if row.experts_hit is None else f"{row.experts_hit:.0%}",
                )
                lines.append((*cells, fixed(row.time_over_floor, 1)) if floor else cells)
        columns = ("model", "on", "ms", "examples/s" if examples else "tokens/s", "/dense", "95 %", "hit", *floor)
        yield Grid(regime, columns, tuple(lines), WORDS, num_keys=2, explained=("/dense", *floor, "hit"))


def _experts(result: ModelBench) -> Grid:
    """Means and ends over layers; details are in the JSON."""
    lines = []
    for name, layers in result.experts.items():
        if not layers:
            continue
        load = [share * len(layer.load) for layer in layers for share in layer.load]
        captures = [layer.oracle_capture for layer in layers]
        random = [layer.random_capture for layer in layers]
        lines.append(
            (
                name,
                str(len(layers)),
                f"{min(load):.2f}",
                f"{max(load):.2f}",
                f"{sum(captures) / len(layers):.3f}",
                f"{min(captures):.3f}",
                f"{sum(random) / len(layers):.3f}",
            )
        )
    columns = ("model", "layers", "least load", "most load", "of oracle", "worst layer", "random choice")
    return Grid("experts: load over even load, share of the oracle's energy", columns, tuple(lines), WORDS)


def _changes(result: ModelBench) -> Grid:
    """What is worse, and all ratios of time and perplexity."""
    regressions = result.regressions
    lines = tuple(
        (change.row, change.what, fixed(change.old, 3), fixed(change.new, 3), fixed(change.ratio, 3), mark)
        for change in (regressions.changes if regressions else ())
        for mark in ["WORSE" if change.worse else "ok"]
    )
    title = f"against {regressions.baseline}" if regressions else ""
    return Grid(title, ("row", "what", "then", "now", "ratio", ""), lines, WORDS, num_keys=2)


def _row_name(row: Speed) -> str:
    return f"{row.model} on {row.implementation}, {_regime(row)}"


def _regime(row: Speed | Verdict) -> str:
    return f"{row.phase} {row.batch} x {row.prompt_tokens}"
