"""The tables of a report: in every cell text to read and a value to sort by."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moeify.benchmark.engines.results import EngineFile, EngineSpeed
from moeify.benchmark.models.results import PARTS, Interval, Model, ModelBench, Part, Quality, Speed, Verdict
from moeify.check.tasks_results import TaskResult
from moeify.reporting.facts import ALL_TEXTS, Facts, active_parameters, parameters, quality_of, ratio_of
from moeify.reporting.reader import Source
from moeify.words import count, factor, number, percent, size

if TYPE_CHECKING:
    from moeify.training.finetune import FinetuneHistory

T = TypeVar("T")
MISSING = "\u2013"
KINDS = {"dense": "dense", "moe": "mixture of experts", "static": "pruned (static)"}
OUTCOMES = {"faster": "\u25b2 faster", "same": "= same", "slower": "\u25bc slower", "cannot tell": "? cannot tell"}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: for the reader.
        value: to sort by; None sorts by the text.
        note: smaller, below.
    """

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; columns with values are set to the right, and `wide` ones may break into lines."""

    key: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    wide: tuple[str, ...] = ("why", "not measured because")

    @property
    def numeric(self) -> tuple[bool, ...]:
        return tuple(any(row[index].value is not None for row in self.rows) for index in range(len(self.columns)))


def table(key: str, caption: str, items: Iterable[T], columns: Sequence[tuple[str, Callable[[T], Cell]]]) -> Table:
    """A row an item, a column a name and a function of the item."""
    rows = tuple(tuple(make(item) for _, make in columns) for item in items)
    return Table(key, caption, tuple(name for name, _ in columns), rows)


def cell(value: float | None, words: Callable[[float], str] = number, note: str = "") -> Cell:
    return Cell(MISSING) if value is None else Cell(words(value), value, note)


def whole(value: float) -> str:
    return f"{value:,.0f}"


def sizes(bench: ModelBench) -> Table:
    """Parameters, work, bytes and memory of each model."""

    def total(model: Model, name: str) -> int:
        return sum(getattr(part, name) for part in model.parts.values())

    return table(
        "sizes",
        "Size, work and memory",
        bench.models,
        [
            ("model", lambda model: Cell(model.name, note=KINDS[model.kind])),
            ("experts", lambda model: Cell(_layout(model))),
            ("active parameters", lambda model: cell(active_parameters(model), count)),
            ("stored parameters", lambda model: cell(parameters(model), count)),
            ("FFN active", lambda model: cell(model.active_share, percent)),
            ("GFLOP / token", lambda model: cell(total(model, "flops_per_token") / 1e9)),
            ("read / decoded token", lambda model: cell(total(model, "bytes_per_decoded_token"), size)),
            ("on disk", lambda model: cell(model.bytes_on_disk, size)),
            ("peak memory, loading", lambda model: cell(model.load_peak_memory_bytes, size)),
            ("peak memory, running", lambda model: cell(model.peak_memory_bytes, size)),
        ],
    )


def _layout(model: Model) -> str:
    if model.num_experts is None:
        return MISSING
    shared = f", {model.num_shared} shared" if model.num_shared else ""
    return f"{model.num_active} of {model.num_experts}{shared}"


def qualities(bench: ModelBench) -> Table:
    """Each model on each text, and on all of them if there are several."""
    rows: list[Quality] = []
    for model in bench.models:
        own = [row for row in bench.quality if row.model == model.name]
        pooled = quality_of(bench, model.name)
        rows += [*own, pooled] if pooled and len(own) > 1 else own
    texts = {ALL_TEXTS: ALL_TEXTS, **_short([row.data for row in bench.quality])}

    def over(control: str) -> Callable[[Quality], Cell]:
        return lambda row: _ratio(row.over_static.get(control))

    controls = dict.fromkeys(chain(*(row.over_static for row in rows)))
    columns: list[tuple[str, Callable[[Quality], Cell]]] = [
        ("model", lambda row: Cell(row.model)),
        ("text", lambda row: Cell(texts[row.data])),
        ("tokens", lambda row: cell(row.num_tokens, whole)),
        ("perplexity", lambda row: cell(row.perplexity, note=_edges(row.perplexity_low, row.perplexity_high))),
        ("perplexity / dense", lambda row: _ratio(ratio_of(row))),
        *((f"perplexity / {control}", over(control)) for control in controls),
        ("KL to dense (nats)", lambda row: cell(row.kl_nats, note=_edges(row.kl_low, row.kl_high))),
        ("same next token", lambda row: cell(row.top1_agreement, percent)),
    ]
    return table("qualities", "Quality, with 95 % intervals", rows, columns)


def tasks(bench: ModelBench) -> Table:
    """Each model's score on each task, and its distance to the dense model's on the same questions."""

    def signed(value: float) -> str:
        return f"{value:+.3f}"

    def difference(row: TaskResult) -> Cell:
        if row.model == bench.models[0].name:
            return Cell(MISSING)
        return cell(row.difference, signed, f"{signed(row.difference_low)} to {signed(row.difference_high)}")

    return table(
        "tasks",
        "Tasks, with 95 % intervals",
        bench.tasks,
        [
            ("task", lambda row: Cell(f"{Path(row.task).name} {row.metric}")),
            ("model", lambda row: Cell(row.model)),
            ("questions", lambda row: cell(row.num_questions, whole)),
            ("score", lambda row: cell(row.score, note=_edges(row.score_low, row.score_high))),
            ("score - dense", difference),
            ("by chance", lambda row: cell(row.chance)),
        ],
    )


def _short(paths: Sequence[str]) -> dict[str, str]:
    """Path -> its last part, unless two would be called the same."""
    names = {path: Path(path).name or path for path in paths}
    return names if len(set(names.values())) == len(names) else {path: path for path in paths}


def _ratio(ratio: Interval | None) -> Cell:
    return Cell(MISSING) if ratio is None else cell(ratio.value, factor, _edges(ratio.low, ratio.high))


def _edges(low: float | None, high: float | None) -> str:
    return f"{number(low)} to {number(high)}" if low is not None and high is not None and low != high else ""


def parts(bench: ModelBench) -> Table:
    """Parameters by part: stored, and below it active."""

    def part(name: str) -> Callable[[Model], Cell]:
        return lambda model: _part(model.parts.get(name))

    return table(
        "parts",
        "Where the parameters are: stored, and active for a token",
        bench.models,
        [
            ("model", lambda model: Cell(model.name)),
            *((name, part(name)) for name in PARTS if any(name in model.parts for model in bench.models)),
        ],
    )


def _part(part: Part | None) -> Cell:
    return Cell(MISSING) if part is None else cell(part.parameters, count, f"{count(part.active_parameters)} active")


def _regime() -> list[tuple[str, Callable[[Speed | Verdict], Cell]]]:
    return [
        ("model", lambda row: Cell(row.model)),
        ("implementation", lambda row: Cell(row.implementation)),
        ("phase", lambda row: Cell(row.phase)),
        ("prompt tokens", lambda row: cell(row.prompt_tokens, whole)),
        ("batch", lambda row: cell(row.batch, whole)),
    ]


def verdicts(all_facts: Sequence[Facts]) -> Table:
    """Where each model is faster or slower than the dense one, and why."""
    return table(
        "verdicts",
        "Each model on its fastest implementation, regime by regime",
        [regime for facts in all_facts for regime in facts.regimes],
        [
            *_regime(),
            ("speed / dense", lambda row: cell(1 / row.time_over_dense, factor)),
            ("verdict", lambda row: Cell(OUTCOMES[row.outcome])),
            ("why", lambda row: Cell(row.why)),
        ],
    )


def timings(bench: ModelBench) -> Table:
    """Every implementation that was timed."""

    def over_dense(row: Speed) -> Cell:
        return cell(row.time_over_dense, note=_edges(row.time_over_dense_low, row.time_over_dense_high))

    return table(
        "timings",
        "Each implementation that was timed; below it the 10 % and 90 % quantiles, or the 95 % interval",
        bench.speed,
        [
            *_regime(),
            ("ms", lambda row: cell(row.ms_p50, note=_edges(row.ms_p10, row.ms_p90))),
            ("tokens / s", lambda row: cell(row.tokens_per_second)),
            ("time / dense", over_dense),
            ("time / floor", lambda row: cell(row.time_over_floor)),
            ("experts hit", lambda row: cell(row.experts_hit, percent)),
            ("not measured because", lambda row: Cell(row.reason)),
        ],
    )


def engines(bench: ModelBench) -> Table:
    """Every file in llama.cpp: each regime that was timed, or why there is none."""
    timed = {(row.model, row.type) for row in bench.engine_speed}
    files = {(row.model, row.type): row for row in bench.engine_files}
    rows: list[tuple[EngineFile, EngineSpeed | None]] = [
        *((files[row.model, row.type], row) for row in bench.engine_speed),
        *((row, None) for key, row in files.items() if key not in timed),
    ]

    def speed(make: Callable[[EngineSpeed], Cell]) -> Callable[[tuple[EngineFile, EngineSpeed | None]], Cell]:
        return lambda row: Cell(MISSING) if row[1] is None else make(row[1])

    def over_dense(row: EngineSpeed) -> Cell:
        return cell(row.time_over_dense, note=_edges(row.time_over_dense_low, row.time_over_dense_high))

    return table(
        "engines",
        "In llama.cpp, times below which stand the least and largest ratio of the rounds",
        rows,
        [
            ("model", lambda row: Cell(row[0].model)),
            ("type", lambda row: Cell(row[0].type)),
            ("phase", speed(lambda row: Cell(row.phase))),
            ("tokens", speed(lambda row: cell(row.num_tokens, whole))),
            ("threads", speed(lambda row: cell(row.threads, whole))),
            ("tokens / s", speed(lambda row: cell(row.tokens_per_second))),
            ("time / dense", speed(over_dense)),
            ("on disk", lambda row: cell(row[0].num_bytes, size)),
            ("perplexity / dense", lambda row: cell(row[0].over_dense, factor)),
            ("perplexity / transformers", lambda row: cell(row[0].over_transformers, lambda value: f"{value:.4f}")),
            ("not measured because", lambda row: Cell(row[0].reason)),
        ],
    )


def training(key: str, source: "Source[FinetuneHistory]") -> Table:
    """Figures on held-out text before and after each stage of fine-tuning."""
    return table(
        f"{key}-stages",
        f"Fine-tuning: {source.file}",
        [(stage, figure) for stage in source.value.stages for figure in stage.before if figure in stage.after],
        [
            ("stage", lambda row: Cell(row[0].stage)),
            ("figure", lambda row: Cell(row[1].replace("_", " "))),
            ("before", lambda row: cell(row[0].before[row[1]])),
            ("after", lambda row: cell(row[0].after[row[1]])),
            ("tokens", lambda row: cell(row[0].num_tokens, whole)),
        ],
    )
