"""Tables of `moeify search`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.words import ranges

if TYPE_CHECKING:
    from moeify.convert.search import SearchResult


def search_tables(result: "SearchResult") -> tuple[Table, ...]:
    """The choice beside uniform, then the frontier."""
    tables = []
    for title, points in (("moeify search", (result.choice, result.uniform)), ("frontier", result.frontier)):
        table = Table(title=title, title_justify="left")
        table.add_column("strategy")
        for column in ("share", "active/experts", "dense layers", "KL, summed", "KL, together", "perplexity", "ratio"):
            table.add_column(column, justify="right", overflow="fold")
        for point in points:
            layout = point.layout
            table.add_row(
                point.strategy,
                f"{point.share:.1%}",
                f"{layout.num_active}/{layout.num_experts}",
                ranges(layout.dense_layers),
                f"{point.predicted:.4f}",
                f"{point.divergence:.4f}",
                f"{point.perplexity:,.2f}",
                f"{point.perplexity / result.dense_perplexity:.3f}",
            )
        tables.append(table)
    return tuple(table for table in tables if table.row_count)
