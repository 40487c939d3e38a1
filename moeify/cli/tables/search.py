"""Tables of `moeify search`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.words import explained, ranges

if TYPE_CHECKING:
    from moeify.convert.search import SearchResult

NOTES = (
    "share: of all FFN parameters, active for a token; --budget bounds it; dense, dropped: layers\n"
    "a dropped layer takes its attention, keys and values along, which the share does not count\n"
    f"{explained('KL')}; summed: of layers changed one at a time\n"
    "perplexity, KL: of a few tokens of the calibration text that nothing was fitted to\n"
    "ratio: perplexity over the dense model's"
)


def search_tables(result: "SearchResult") -> tuple[Table, ...]:
    """The choice beside uniform, then the frontier."""
    tables = []
    chosen = [result.choice, result.uniform, *([result.by_depth] if result.by_depth else [])]
    for title, points in (("moeify search", chosen), ("frontier", result.frontier)):
        columns = ("strategy", "share", "experts", "dense", "dropped", "KL, summed", "KL", "perplexity", "ratio")
        table = DataTable(title, columns, words=("strategy", "dense", "dropped"), notes=NOTES)
        for point in points:
            layout = point.layout
            table.add_row(
                point.strategy,
                f"{point.share:.1%}",
                "" if layout.is_whole else f"{layout.num_active}/{layout.num_experts}",
                ranges(layout.dense_layers),
                ranges(point.dropped_layers),
                f"{point.predicted:.4f}",
                f"{point.divergence:.4f}",
                f"{point.perplexity:,.2f}",
                f"{point.perplexity / result.dense_perplexity:.3f}",
            )
        tables.append(table)
    tables[0].caption = None
    return tuple(table for table in tables if table.row_count)
