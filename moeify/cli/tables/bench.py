"""Tables of `moeify bench`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from moeify.benchmark.grid import Grid
    from moeify.benchmark.layers.results import LayerBench
    from moeify.benchmark.models.results import ModelBench


def layer_bench_tables(result: "LayerBench") -> tuple[Table, ...]:
    """For every pass and routing the peers side by side; last, where it was measured and what could not be."""
    from moeify.benchmark.layers import table as layer_table

    return _grid_tables(layer_table.grids(result), "moeify bench-layer", layer_table.notes(result))


def model_bench_tables(result: "ModelBench") -> tuple[Table, ...]:
    """Compression, quality, speed, experts; where it was measured; verdicts last."""
    from moeify.benchmark.models import table as model_table

    tables = _grid_tables(model_table.grids(result), "moeify bench", model_table.notes(result))
    verdicts = Table(title="verdicts", title_justify="left", show_header=False, show_lines=True)
    for line in model_table.verdict_lines(result):
        verdicts.add_row(line)
    return (*tables, verdicts) if verdicts.row_count else tables


def _grid_tables(grids: "Sequence[Grid]", title: str, notes: Sequence[str]) -> tuple[Table, ...]:
    tables = []
    for grid in grids:
        table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in grid.columns:
            table.add_column(column, justify="left" if column in grid.words else "right", overflow="fold")
        for line in grid.lines:
            table.add_row(*line)
        tables.append(table)
    where = Table(title=title, title_justify="left", show_header=False)
    for note in notes:
        where.add_row(note)
    return (*tables, where)
