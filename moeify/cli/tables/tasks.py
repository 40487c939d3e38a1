"""The table of tasks: questions with right answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from moeify.check.tasks import TaskResult


def tasks_table(results: "Sequence[TaskResult]") -> Table:
    """One row a task, metric and model: the score, and how far it is from the first model's.

    It is 80 columns wide or less for names of usual length; longer ones are folded.
    """
    table = Table(title="tasks", title_justify="left")
    for column in ("task", "model"):
        table.add_column(column, overflow="fold")
    models = dict.fromkeys(result.model for result in results)
    for column in ("score", "95 %", "to first", "95 %")[: 4 if len(models) > 1 else 2]:
        table.add_column(column, justify="right", no_wrap=True)
    short = short_names([result.model for result in results])
    rows = dict.fromkeys((result.task, result.metric) for result in results)
    for number, (task, metric) in enumerate(rows):
        own = [result for result in results if (result.task, result.metric) == (task, metric)]
        if number:
            table.add_section()
        for result in own:
            is_first = result is own[0]
            cells = [
                f"{Path(task).name} {metric}" if is_first else "",
                short[result.model],
                f"{result.score:.3f}",
                f"{result.score_low:.3f} {result.score_high:.3f}",
            ]
            if not is_first:
                cells += [
                    f"{result.difference:+.3f}",
                    f"{result.difference_low:+.3f} {result.difference_high:+.3f}",
                ]
            table.add_row(*cells)
    table.caption = "; ".join(dict.fromkeys(map(_words, results)))
    table.caption_justify = "left"
    return table


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Last parts of paths, unless two would be called the same."""
    short = {model: Path(model).name for model in models}
    return short if len(set(short.values())) == len(short) else {model: model for model in short}


def _words(result: "TaskResult") -> str:
    chance = "" if result.chance is None else f", {result.chance:.3f} by chance"
    return f"{Path(result.task).name}: {result.num_questions:,} questions{chance}"
