"""The tables of a report: text to read and a value to sort by in every cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeify.benchmark.models.results import PARTS, Model, ModelBench, Part, Quality, Speed
from moeify.reporting.facts import Facts, ModelQuality, active_parameters, parameters, quality_of
from moeify.reporting.words import count, factor, number, percent, size

MISSING = "\u2013"
KINDS = {"dense": "dense", "moe": "mixture of experts", "static": "pruned (static)"}
OUTCOMES = {"faster": "\u25b2 faster", "same": "= same", "slower": "\u25bc slower"}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what is read.
        value: what it is sorted by; None sorts by the text.
        note: smaller, below.
    """

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """A table; columns with values are set to the right, and `wide` ones may break into lines."""

    key: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    wide: tuple[str, ...] = ()

    @property
    def numeric(self) -> tuple[bool, ...]:
        return tuple(any(row[index].value is not None for row in self.rows) for index in range(len(self.columns)))


def _cell(value: float | None, text: str | None = None, note: str = "") -> Cell:
    return Cell(MISSING) if value is None else Cell(number(value) if text is None else text, value, note)


def sizes(bench: ModelBench) -> Grid:
    """What each model holds, computes, reads and takes."""
    rows = []
    for model in bench.models:
        parts = model.parts.values()
        flops = sum(part.flops_per_token for part in parts)
        read = sum(part.bytes_per_decoded_token for part in parts)
        memory = (model.load_peak_memory_bytes, model.peak_memory_bytes)
        rows.append(
            (
                Cell(model.name, note=KINDS[model.kind]),
                Cell(_layout(model)),
                _cell(active_parameters(model), count(active_parameters(model))),
                _cell(parameters(model), count(parameters(model))),
                _cell(model.active_share, percent(model.active_share)),
                _cell(flops / 1e9),
                _cell(read, size(read)),
                _cell(model.bytes_on_disk, size(model.bytes_on_disk)),
                *(_cell(value, None if value is None else size(value)) for value in memory),
            )
        )
    columns = (
        *("model", "experts", "active parameters", "stored parameters", "FFN active", "GFLOP / token"),
        *("read / decoded token", "on disk", "peak memory, loading", "peak memory, running"),
    )
    return Grid("sizes", "Size, work and memory", columns, tuple(rows))


def _layout(model: Model) -> str:
    if model.num_experts is None:
        return MISSING
    shared = f", {model.num_shared} shared" if model.num_shared else ""
    return f"{model.num_active} of {model.num_experts}{shared}"


def qualities(bench: ModelBench) -> Grid:
    """Each model on each text, and on all of them if there are several."""
    rows = []
    texts = _short([row.data for row in bench.quality])
    for model in bench.models:
        found = quality_of(bench, model.name)
        if found is None:
            continue
        rows += [_quality_row(row, texts[row.data]) for row in found.rows]
        if len(found.rows) > 1:
            rows.append(_pooled_row(model.name, found))
    columns = (
        *("model", "text", "tokens", "perplexity", "perplexity / dense", "KL to dense (nats)"),
        "same next token",
    )
    return Grid("qualities", "Quality, with 95 % intervals", columns, tuple(rows))


def _short(paths: Sequence[str]) -> dict[str, str]:
    """Path -> its last part, unless two would be called the same."""
    names = {path: Path(path).name or path for path in paths}
    return names if len(set(names.values())) == len(names) else {path: path for path in paths}


def _quality_row(row: Quality, text: str) -> tuple[Cell, ...]:
    return (
        Cell(row.model),
        Cell(text),
        _cell(row.num_tokens, f"{row.num_tokens:,}"),
        _cell(row.perplexity, note=_edges(row.perplexity_low, row.perplexity_high)),
        _cell(row.ratio, factor(row.ratio), _edges(row.ratio_low, row.ratio_high)),
        _cell(row.kl_nats, note=_edges(row.kl_low, row.kl_high)),
        _cell(row.top1_agreement, percent(row.top1_agreement)),
    )


def _pooled_row(name: str, found: ModelQuality) -> tuple[Cell, ...]:
    return (
        Cell(name),
        Cell("all texts"),
        _cell(found.num_tokens, f"{found.num_tokens:,}"),
        _cell(found.perplexity),
        _cell(found.ratio.value, factor(found.ratio.value), _edges(found.ratio.low, found.ratio.high)),
        _cell(found.kl_nats),
        _cell(found.top1_agreement, percent(found.top1_agreement)),
    )


def _edges(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}" if low != high else ""


def parts(bench: ModelBench) -> Grid:
    """Where parameters are: stored, and below it active."""
    columns = ("model", *(part for part in PARTS if any(part in model.parts for model in bench.models)))

    def cell(part: Part | None) -> Cell:
        if part is None:
            return Cell(MISSING)
        return _cell(part.parameters, count(part.parameters), f"{count(part.active_parameters)} active")

    rows = tuple((Cell(model.name), *(cell(model.parts.get(name)) for name in columns[1:])) for model in bench.models)
    return Grid("parts", "Where the parameters are: stored, and active for a token", columns, rows)


def verdicts(all_facts: Sequence[Facts]) -> Grid:
    """Where each model is faster or slower than the dense one, and why."""
    found = [regime for facts in all_facts for phase in facts.phases for regime in phase.regimes]
    rows = tuple(
        (
            Cell(regime.model),
            Cell(regime.phase),
            _cell(regime.prompt_tokens, f"{regime.prompt_tokens:,}"),
            _cell(regime.batch, f"{regime.batch:,}"),
            _cell(1 / regime.time_over_dense, factor(1 / regime.time_over_dense)),
            Cell(OUTCOMES[regime.outcome]),
            Cell(regime.implementation),
            Cell(regime.why),
        )
        for regime in found
    )
    columns = ("model", "phase", "prompt tokens", "batch", "speed / dense", "verdict", "implementation", "why")
    return Grid("verdicts", "Each model on its fastest implementation, regime by regime", columns, rows, ("why",))


def timings(bench: ModelBench) -> Grid:
    """Every implementation that was timed."""
    columns = (
        *("model", "implementation", "phase", "prompt tokens", "batch", "ms", "tokens / s", "time / dense"),
        *("time / floor", "experts hit", "not measured because"),
    )
    return Grid(
        "timings",
        "Each implementation that was timed; below it the 10 % and 90 % quantiles, or the 95 % interval",
        columns,
        tuple(map(_timing, bench.speed)),
        ("not measured because",),
    )


def _timing(row: Speed) -> tuple[Cell, ...]:
    spread = _edges(row.ms_p10, row.ms_p90) if row.ms_p10 is not None and row.ms_p90 is not None else ""
    low, high = row.time_over_dense_low, row.time_over_dense_high
    return (
        Cell(row.model),
        Cell(row.implementation),
        Cell(row.phase),
        _cell(row.prompt_tokens, f"{row.prompt_tokens:,}"),
        _cell(row.batch, f"{row.batch:,}"),
        _cell(row.ms_p50, note=spread),
        _cell(row.tokens_per_second),
        _cell(row.time_over_dense, note=_edges(low, high) if low is not None and high is not None else ""),
        _cell(row.time_over_floor),
        _cell(row.experts_hit, None if row.experts_hit is None else percent(row.experts_hit)),
        Cell(row.reason),
    )
