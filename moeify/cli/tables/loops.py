"""The table of how answers end."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.tasks import short_names
from moeify.words import percent

if TYPE_CHECKING:
    from moeify.check.loops import LoopResult


def loops_tables(results: "Sequence[LoopResult]") -> tuple[Table, ...]:
    """One row a model that answered; no table without any."""
    if not results:
        return ()
    limit = results[0].limit_tokens
    notes = (
        "loops: answers that say the same at least three times in a row\n"
        f"endless: answers without an end after {limit} tokens\n"
        "repeats: share of an answer's sequences of four tokens that stood in it before"
    )
    title = f"answers of chat models: {results[0].num_answers} questions, the likeliest token each time"
    table = DataTable(title, ("model", "loops", "endless", "repeats", "tokens"), words=("model",), notes=notes)
    short = short_names([result.model for result in results])
    for result in results:
        table.add_row(
            short[result.model],
            *(percent(share) for share in (result.loop_rate, result.endless_rate, result.repeat_rate)),
            f"{result.num_tokens:,}",
        )
    return (table,)
