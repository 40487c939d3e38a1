"""Tables of `moeify compare`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.tasks import tasks_tables

if TYPE_CHECKING:
    from moeify.check.compare import Comparison


def compare_tables(comparison: "Comparison") -> tuple[Table, ...]:
    """One row a method and budget: over all text with its intervals, then text by text, then task by task."""
    over_all = Table(title=f"moeify compare {Path(comparison.model).name}", title_justify="left")
    by_text = Table(title="perplexity on each text", title_justify="left")
    for table in (over_all, by_text):
        table.add_column("method", overflow="fold", min_width=20)
        table.add_column("active", justify="right")
    for column in ("perplexity", "95 %", "to static + refit", "95 %", "gap closed"):
        over_all.add_column(column, justify="right", overflow="fold")
    for text in comparison.evaluation["tokens"]:
        by_text.add_column(Path(text).stem, justify="right", overflow="fold")
    for row in comparison.rows:
        over_all.add_row(
            row.method,
            f"{row.budget:.0%}",
            f"{row.perplexity:,.2f}",
            f"{row.low:,.1f} {row.high:,.1f}",
            f"{row.ratio:.3f}",
            f"{row.ratio_low:.3f} {row.ratio_high:.3f}",
            f"{row.gap_closed:.0%}",
        )
        by_text.add_row(row.method, f"{row.budget:.0%}", *(f"{value:,.1f}" for value in row.texts.values()))
    return (over_all, by_text, *tasks_tables(comparison.tasks))
