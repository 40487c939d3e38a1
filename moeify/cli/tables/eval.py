"""The table of `moeify eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from moeify.check.perplexity import EvalResult


def eval_table(results: "Sequence[EvalResult]") -> Table:
    """One row a model and text; the ratio is to the first model on the same text."""
    table = Table(title="moeify eval", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("text", overflow="fold")
    for column in ("perplexity", "ratio", "tokens", "tokens/s"):
        table.add_column(column, justify="right")
    first = {result.data: result.perplexity for result in reversed(results)}
    models = {result.model for result in results}
    short = {model: Path(model).name for model in models}
    if len(set(short.values())) < len(models):
        short = {model: model for model in models}
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
