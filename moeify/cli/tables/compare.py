"""Tables of `moeify compare`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.tasks import tasks_tables
from moeify.words import between, explained, number

if TYPE_CHECKING:
    from moeify.check.compare import Comparison


def compare_tables(comparison: "Comparison") -> tuple[Table, ...]:
    """One row a method and budget: over all text with its intervals, then text by text, then task by task."""
    tokens, context = comparison.evaluation["tokens"], comparison.evaluation["context"]
    keys = ("method", "active")
    over_all = DataTable(
        f"moeify compare {Path(comparison.model).name}, {sum(tokens.values()):,} tokens in blocks of {context:,}",
        (*keys, comparison.measure, "95 %", "over static", "95 %", "gap closed"),
        words=keys,
        num_keys=2,
        notes=explained(comparison.measure, "over static", "gap closed"),
    )
    texts = [Path(text).stem for text in tokens]
    by_text = DataTable(f"{comparison.measure} on each text", (*keys, *texts), words=keys, num_keys=2)
    digits = 2 if comparison.measure == "perplexity" else 5
    for row in comparison.rows:
        over_all.add_row(
            row.method,
            f"{row.budget:.0%}",
            f"{row.value:,.{digits}f}",
            f"{number(row.low)} {number(row.high)}",
            f"{row.ratio:.3f}",
            between(row.ratio_low, row.ratio_high, 3),
            f"{row.gap_closed:.0%}",
        )
        by_text.add_row(row.method, f"{row.budget:.0%}", *(f"{value:,.{digits - 1}f}" for value in row.texts.values()))
    # The share of the FFN is not all that they save.
    saved = [
        f"{row.method}, {row.budget:.0%}: layers gone, with attention, keys, values: "
        f"{row.diagnostics['dropped_layers']:.0f}"
        for row in comparison.rows
        if "dropped_layers" in row.diagnostics
    ]
    over_all.caption = "\n".join([str(over_all.caption), *saved])
    perplexities = (over_all, by_text) if len(tokens) > 1 else (over_all,)
    return (*perplexities, *tasks_tables(comparison.tasks))
