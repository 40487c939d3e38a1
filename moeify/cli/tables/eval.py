"""The tables of `moeify eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.loops import loops_tables
from moeify.cli.tables.tasks import short_names, tasks_tables
from moeify.cli.tables.words import windows
from moeify.words import explained, listing, percent

if TYPE_CHECKING:
    from moeify.check.evaluate import Evaluation
    from moeify.check.perplexity import EvalResult


def eval_tables(evaluation: "Evaluation") -> tuple[Table, ...]:
    """Perplexities, then tasks, then how answers end."""
    return (eval_table(evaluation.results), *tasks_tables(evaluation.tasks), *loops_tables(evaluation.loops))


def eval_table(results: "Sequence[EvalResult]") -> DataTable:
    """One row a model and text; the ratio is to the first model on the same text."""
    keys = ("model", "text")
    table = DataTable(
        "moeify eval", (*keys, "perplexity", "ratio", "tokens", "tokens/s"), words=keys, notes=_notes(results)
    )
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


def _notes(results: "Sequence[EvalResult]") -> str:
    how = {windows(result.context, result.stride) for result in results if result.context}
    measured = f"; here {how.pop()}" if len(how) == 1 else ""
    short = short_names([result.model for result in results])
    own = {result.model: listing(result.calibrated_on) for result in results if result.calibrated_on}
    lines = [
        f"{explained('perplexity')}{measured}",
        "ratio: to the first model's perplexity on the same text",
        *(f"{short[model]} was calibrated on {texts}" for model, texts in own.items()),
    ]
    for result in results:
        if result.active_share is not None:
            text = Path(result.data).name
            lines.append(f"{short[result.model]} ran {percent(result.active_share)} of its FFNs for a token of {text}")
    return "\n".join(lines)
