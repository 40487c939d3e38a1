"""The tables of `moeify eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.tasks import short_names, tasks_tables

if TYPE_CHECKING:
    from moeify.check.evaluate import Evaluation
    from moeify.check.perplexity import EvalResult


def eval_tables(evaluation: "Evaluation") -> tuple[Table, ...]:
    """Perplexities, then tasks."""
    return (eval_table(evaluation.results), *tasks_tables(evaluation.tasks))


def eval_table(results: "Sequence[EvalResult]") -> Table:
    """One row a model and text; the ratio is to the first model on the same text."""
    table = Table(title="moeify eval", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("text", overflow="fold")
    for column in ("perplexity", "ratio", "tokens", "tokens/s"):
        table.add_column(column, justify="right")
    first = {result.data: result.perplexity for result in reversed(results)}
    short = short_names([result.model for result in results])
    for result in results:
        table.add_row(
            short[result.model],
            Path(result.data).name,
            f"{result.perplexity:,.3f}",
            f"{result.perplexity / first[result.data]:.3f}",
            f"{result.num_tokens:,}",
            f"{result.tokens_per_second:,.0f}",
        )
    return table
