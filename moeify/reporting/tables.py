"""The tables of a report, from the benchmark's numbers and what else lies in the folder of a run."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from moeify.benchmark.grid import Grid
from moeify.benchmark.models import table as benchmark
from moeify.benchmark.models.results import Interval, LayerExperts, Model, ModelBench, Verdict
from moeify.reporting.facts import Facts, active_parameters, parameters, read_for_token
from moeify.reporting.reader import RunFolder, Training
from moeify.words import count, duration, factor, number, percent, size

T = TypeVar("T")
MISSING = "\u2013"
KINDS = {"dense": "dense", "moe": "mixture of experts", "static": "pruned"}
OUTCOMES = {"faster": "\u25b2 faster", "same": "= same", "slower": "\u25bc slower", "cannot tell": "? cannot tell"}
WIDE = ("why", "prefers")
# A text's favourites that are named.
FAVOURITES = 5
# What training bought is told for this many parts of it, or for each hour where there are more.
PARTS, MOST_PARTS = 4, 12


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and a note below it."""

    text: str
    note: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """A table; columns with numbers are set to the right, and WIDE ones may break into lines."""

    key: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def style(self, column: int) -> str:
        if any(row[column].is_number for row in self.rows):
            return "number"
        return "wide" if self.columns[column] in WIDE else "words"


def table(key: str, caption: str, items: Iterable[T], columns: Sequence[tuple[str, Callable[[T], Cell]]]) -> Table:
    """A row an item, a column a name and a function of the item; columns without any text are left out."""
    rows = [[make(item) for _, make in columns] for item in items]
    used = [index for index in range(len(columns)) if any(row[index].text != MISSING for row in rows)]
    cells = tuple(tuple(row[index] for index in used) for row in rows)
    return Table(key, caption, tuple(columns[index][0] for index in used), cells)


def cell(value: float | None, words: Callable[[float], str] = number, note: str = "") -> Cell:
    return Cell(MISSING) if value is None else Cell(words(value), note, is_number=True)


def whole(value: float) -> str:
    return f"{value:,.0f}"


def models(all_facts: Sequence[Facts]) -> Table:
    """Every model of the benchmark: what it costs and how good it is, over all texts."""
    return table(
        "models",
        "Every model, over all texts; below a number its 95 % interval",
        all_facts,
        [
            ("model", lambda facts: Cell(facts.model.name, KINDS[facts.model.kind] * (facts.model.kind != "dense"))),
            ("experts", lambda facts: Cell(_layout(facts.model))),
            ("active parameters", lambda facts: cell(active_parameters(facts.model), count)),
            ("stored parameters", lambda facts: cell(parameters(facts.model), count)),
            ("perplexity", lambda facts: cell(facts.quality.perplexity if facts.quality else None)),
            ("perplexity / dense", lambda facts: _ratio(facts.ratio if facts.model.kind != "dense" else None)),
            ("perplexity / pruned", lambda facts: _ratio(facts.over_control)),
            ("same next token", lambda facts: cell(facts.quality.top1_agreement if facts.quality else None, percent)),
            ("like the dense model", _likeness),
            ("read / decoded token", lambda facts: cell(read_for_token(facts.model) or None, size)),
            ("on disk", lambda facts: cell(facts.model.bytes_on_disk, size)),
            ("peak memory", lambda facts: cell(facts.model.peak_memory_bytes, size)),
        ],
    )


def _likeness(facts: Facts) -> Cell:
    """What stayed, of a model that writes no text."""
    likeness = facts.likeness
    return cell(
        likeness.value if likeness else None,
        lambda value: f"{value:.3f}",
        f"{likeness.low:.3f} to {likeness.high:.3f}" if likeness and likeness.low < likeness.high else "",
    )


def scores(run: RunFolder) -> Table:
    """Models that write no text by their own measure: the benchmark's, the recipe's, and those that `eval` kept."""
    rows = [
        *run.bench.value.scores,
        *(run.ran.value.scores if run.ran else ()),
        *(run.evaluated.value.scores if run.evaluated else ()),
    ]
    return table(
        "scores",
        "Every model by its own measure, the dense one first",
        rows,
        [
            ("model", lambda row: Cell(Path(row.model).name or row.model)),
            ("examples", lambda row: cell(row.num_examples, whole, Path(row.data).name)),
            ("measure", lambda row: Cell(row.measure)),
            ("score", lambda row: cell(row.value, lambda value: f"{value:.4f}")),
        ],
    )


def _layout(model: Model) -> str:
    if model.num_experts is None:
        return MISSING
    return model.experts_words


def speed(row: Verdict) -> Interval:
    """As a multiple of the dense model's."""
    times = (row.time_over_dense, row.time_over_dense_high, row.time_over_dense_low)
    return Interval(*(1 / (time or row.time_over_dense) for time in times))


def _ratio(ratio: Interval | None) -> Cell:
    return Cell(MISSING) if ratio is None else cell(ratio.value, factor, f"{factor(ratio.low)} to {factor(ratio.high)}")


def evaluations(run: RunFolder) -> Table | None:
    """Every model that a recipe evaluated, controls that were not benchmarked as well; None without any."""
    rows = run.ran.value.evals if run.ran else ()
    if not rows:
        return None
    dense = {row.data: row.perplexity for row in rows if row.model == rows[0].model}
    return table(
        "evaluations",
        "Every model that the recipe made, by its own evaluation; compare within this table",
        rows,
        [
            ("model", lambda row: Cell(Path(row.model).name or row.model)),
            ("text", lambda row: Cell(row.data)),
            ("tokens", lambda row: cell(row.num_tokens, whole)),
            ("perplexity", lambda row: cell(row.perplexity)),
            ("perplexity / dense", lambda row: cell(row.perplexity / (dense.get(row.data) or math.nan), factor)),
        ],
    )


def loops(run: RunFolder) -> Table:
    """How the answers of chat models end."""
    return table(
        "loops",
        "Answers to a few questions, the likeliest token each time; a loop says the same three times in a row or more",
        run.loops,
        [
            ("model", lambda row: Cell(Path(row.model).name or row.model)),
            ("answers", lambda row: cell(row.num_answers, whole)),
            ("in a loop", lambda row: cell(row.loop_rate, percent)),
            ("without an end", lambda row: cell(row.endless_rate, percent, f"of {row.limit_tokens} tokens")),
            ("repeats", lambda row: cell(row.repeat_rate, percent)),
        ],
    )


def comparison(run: RunFolder) -> Table | None:
    """Other methods on other texts, each against static pruning at its budget; None without any."""
    if run.compared is None:
        return None
    measure = run.compared.value.measure
    return table(
        "comparison",
        f"Methods side by side ({run.compared.file}); pruned is static pruning with refit at the same budget",
        run.compared.value.rows,
        [
            ("method", lambda row: Cell(row.method)),
            ("FFN active", lambda row: cell(row.budget, percent)),
            (measure, lambda row: cell(row.value)),
            (
                f"{run.compared.value.measure} / pruned",
                lambda row: _ratio(Interval(row.ratio, row.ratio_low, row.ratio_high)),
            ),
            ("gap to dense closed", lambda row: cell(row.gap_closed, percent)),
        ],
    )


def verdicts(all_facts: Sequence[Facts]) -> Table:
    """Where each model is faster or slower than the dense one, and why."""
    return table(
        "verdicts",
        "Each model on its fastest implementation, regime by regime",
        [regime for facts in all_facts for regime in facts.regimes],
        [
            ("model", lambda row: Cell(row.model)),
            ("implementation", lambda row: Cell(row.implementation)),
            ("phase", lambda row: Cell(row.phase)),
            ("tokens", lambda row: cell(row.prompt_tokens, whole)),
            ("batch", lambda row: cell(row.batch, whole)),
            ("speed / dense", lambda row: _ratio(speed(row))),
            ("verdict", lambda row: Cell(OUTCOMES[row.outcome])),
            ("why", lambda row: Cell(row.why)),
        ],
    )


def all_numbers(bench: ModelBench) -> list[Table]:
    """The tables that `moeify bench` prints."""
    return [of_grid(f"numbers-{index}", grid) for index, grid in enumerate(benchmark.grids(bench))]


def of_grid(key: str, grid: Grid) -> Table:
    """A table of `moeify bench`."""

    def cells(line: tuple[str, ...]) -> tuple[Cell, ...]:
        named = zip(line, grid.columns, strict=True)
        return tuple(Cell(text or MISSING, is_number=name not in grid.words) for text, name in named)

    return Table(key, grid.title, grid.columns, tuple(map(cells, grid.lines)))


def preferences(key: str, layers: Sequence[LayerExperts]) -> Table | None:
    """Which experts each text prefers; None where only one text was measured."""
    texts = list(layers[0].texts)
    if len(texts) < 2:
        return None

    def shares(text: str) -> Iterator[tuple[float, float, str]]:
        """Of every expert the text's share, that of the mean text, and its name."""
        for layer in layers:
            for expert, own in enumerate(layer.texts[text]):
                mean = sum(layer.texts[name][expert] for name in texts) / len(texts)
                yield own, mean, f"layer {layer.layer}, expert {expert}"

    def elsewhere(text: str) -> float:
        """The share of a text's choices that the mean text would not make: total variation."""
        return sum(max(0.0, own - mean) for own, mean, _ in shares(text)) / len(layers)

    def favourites(text: str) -> str:
        lifts = sorted(((own / mean, name) for own, mean, name in shares(text) if own), reverse=True)
        return "; ".join(f"{name}: {factor(lift)}x" for lift, name in lifts[:FAVOURITES])

    return table(
        f"{key}-texts",
        "Which experts each text prefers: against the mean of the texts",
        texts,
        [
            ("text", lambda text: Cell(Path(text).name or text)),
            ("choices of its own", lambda text: cell(elsewhere(text), percent)),
            ("prefers", lambda text: Cell(favourites(text))),
        ],
    )


def training(tuned: Sequence[Training]) -> Table:
    """What every part of every fine-tuning bought."""
    columns = ("checkpoint", "stage", "tokens so far", "time so far", "figure", "before", "after", "bought")
    caption = "What training bought, part by part; less is better"
    return Table("training", caption, columns, tuple(row for one in tuned for row in _bought(one)))


def _bought(one: Training) -> Iterator[tuple[Cell, ...]]:
    """Each stage in equal parts of its time where its curve is known, as its steps take equally long."""
    for stage, seconds in zip(one.stages, one.seconds, strict=True):
        common = [figure for figure in stage.before if figure in stage.after]
        for figure in ["perplexity"] if "perplexity" in common else common:
            curve = one.curve(stage) if figure == "perplexity" else []
            points = (
                curve
                if len(curve) > 1
                else [(0.0, stage.before[figure]), (float(stage.num_tokens), stage.after[figure])]
            )
            parts = min(max(PARTS, round((seconds or 0) / 3600)), MOST_PARTS, len(points) - 1)
            ends = [points[math.ceil(part * (len(points) - 1) / parts)] for part in range(parts + 1)]
            for (_, before), (tokens, after) in pairwise(ends):
                time = None if seconds is None else seconds * tokens / (points[-1][0] or 1)
                share = 1 - after / before if before else 0.0
                yield (
                    *(Cell(one.name), Cell(stage.stage), cell(tokens, count), cell(time, duration)),
                    *(Cell(figure.replace("_", " ")), cell(before), cell(after)),
                    cell(abs(share), percent, "less" if share >= 0 else "more"),
                )
