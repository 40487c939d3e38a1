"""Tables of tasks: questions with right answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.words import explained

if TYPE_CHECKING:
    from moeify.check.tasks_results import TaskResult


def tasks_tables(results: "Sequence[TaskResult]") -> tuple[Table, ...]:
    """For each task and metric a row a model: its score, and how far that is from the first model's."""
    short = short_names([result.model for result in results])
    keys = dict.fromkeys((result.task, result.metric) for result in results)
    return tuple(_table([result for result in results if (result.task, result.metric) == key], short) for key in keys)


def _table(results: "Sequence[TaskResult]", short: dict[str, str]) -> Table:
    first, *others = results
    chance = "" if first.chance is None else f", {first.chance:.3f} by chance"
    title = f"{Path(first.task).name}, {first.metric}: {first.num_questions:,} questions{chance}"
    columns = ("model", "score", "95 %", "to first", "95 %")[: 5 if others else 3]
    words = ("acc", "95 %", "to first") if others else ("acc", "95 %")
    known = first.metric in ("acc", "acc_norm")
    table = DataTable(title, columns, words=("model",), notes=explained(*words[0 if known else 1 :]))
    for result in results:
        cells = [short[result.model], f"{result.score:.3f}", f"{result.score_low:.3f} {result.score_high:.3f}"]
        if result is not first:
            difference = f"{result.difference_low:+.3f} {result.difference_high:+.3f}"
            cells += [f"{result.difference:+.3f}", difference]
        table.add_row(*cells)
    return table


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Last parts of paths, unless two would be called the same."""
    short = {model: Path(model).name for model in models}
    return short if len(set(short.values())) == len(short) else {model: model for model in short}
