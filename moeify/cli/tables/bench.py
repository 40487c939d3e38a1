"""Tables of `moeify bench` and `moeify bench-layer`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.words import key_value_table
from moeify.words import explained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeify.benchmark.grid import Grid
    from moeify.benchmark.layers.results import LayerBench
    from moeify.benchmark.models.results import ModelBench


def layer_bench_tables(result: "LayerBench") -> tuple[Table, ...]:
    """For every pass and routing the peers side by side; last, where it was measured and what could not be."""
    from moeify.benchmark.layers import table

    grids = _grid_tables(table.grids(result))
    return (*grids, key_value_table("moeify bench-layer", [("*", note) for note in table.notes(result)]))


def model_bench_tables(result: "ModelBench") -> tuple[Table, ...]:
    """Compression, quality, speed, experts; where it was measured; verdicts last."""
    from moeify.benchmark.models import table

    grids = _grid_tables(table.grids(result))
    notes = key_value_table("moeify bench", [("*", note) for note in table.notes(result)])
    verdicts = key_value_table("verdicts", [("*", line) for line in table.verdict_lines(result)])
    return (*grids, notes, verdicts) if verdicts.row_count else (*grids, notes)


def _grid_tables(grids: "Sequence[Grid]") -> Iterator[Table]:
    told: set[str] = set()
    for grid in grids:
        # Each word once.
        notes = explained(*(word for word in grid.explained if word not in told))
        told.update(grid.explained)
        table = DataTable(grid.title, grid.columns, words=grid.words, num_keys=grid.num_keys, notes=notes)
        for line in grid.lines:
            table.add_row(*line)
        yield table
