"""Tables of `moeify search`."""

import math
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.words import explained, ranges

if TYPE_CHECKING:
    from moeify.convert.search import SearchResult
    from moeify.layout import Layout

SHARES = (
    "share: of all FFN parameters, active for a token; --budget bounds it; dense, dropped: layers\n"
    "a dropped layer takes its attention, keys and values along, which the share does not count\n"
)
NOTES = (
    f"{SHARES}"
    f"{explained('KL')}; summed: of layers changed one at a time\n"
    "perplexity, KL: of a few tokens of the calibration text that nothing was fitted to\n"
    "ratio: perplexity over the dense model's"
)

OTHER_NOTES = (
    f"{SHARES}"
    "change: KL of the head's distribution to the dense model's, or 1 - cosine of the last hidden states\n"
    "of a few inputs that nothing was fitted to; summed: of layers changed one at a time"
)


def _experts(layout: "Layout") -> str:
    """Active of all experts; of layers that differ the least and the most."""
    numbers = sorted({min(layout.cut_counts), max(layout.cut_counts)})
    return f"{'-'.join(map(str, numbers))}/{layout.num_experts}"


def search_tables(result: "SearchResult") -> tuple[Table, ...]:
    """The choice beside uniform, then the frontier."""
    tables = []
    has_perplexity = not math.isnan(result.dense_perplexity)
    change = "KL" if has_perplexity else "change"
    chosen = [result.choice, result.uniform, *(point for point in (result.by_depth, result.as_needed) if point)]
    chosen = list(dict.fromkeys(chosen))
    for title, points in (("moeify search", chosen), ("frontier", result.frontier)):
        further = ("perplexity", "ratio") if has_perplexity else ()
        columns = ("strategy", "share", "experts", "dense", "dropped", f"{change}, summed", change, *further)
        table = DataTable(
            title, columns, words=("strategy", "dense", "dropped"), notes=NOTES if has_perplexity else OTHER_NOTES
        )
        for point in points:
            layout = point.layout
            ratio = point.perplexity / result.dense_perplexity
            perplexities = (f"{point.perplexity:,.2f}", f"{ratio:.3f}") if has_perplexity else ()
            table.add_row(
                point.strategy,
                f"{point.share:.1%}",
                "" if layout.is_whole else _experts(layout),
                ranges(layout.dense_layers),
                ranges(point.dropped_layers),
                "" if math.isnan(point.predicted) else f"{point.predicted:.4f}",
                f"{point.divergence:.4f}",
                *perplexities,
            )
        tables.append(table)
    tables[0].caption = None
    return tuple(table for table in tables if table.row_count)
