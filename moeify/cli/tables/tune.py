"""The table of `moeify tune`."""

from typing import TYPE_CHECKING

from moeify.cli.tables.columns import DataTable

if TYPE_CHECKING:
    from moeify.kernels.tune_model import TuneResult


def tune_table(result: "TuneResult") -> DataTable:
    """What tuning gained, a row for each kernel and number of tokens."""
    shape = f"{result.num_ranks} of {result.num_experts} experts, {result.dim} x {result.width}"
    columns = ("kernel/rows", "tokens", "before us", "after us", "ratio", "tile", "warps", "stages", "tried")
    table = DataTable(f"{shape} on {result.device}", columns, words=("kernel/rows",), num_keys=2)
    for row in result.kernels:
        launch = row.launch
        table.add_row(
            row.key,
            str(row.tokens),
            f"{row.before_us:.1f}",
            f"{row.after_us:.1f}",
            f"{row.after_us / row.before_us:.2f}",
            f"{launch.rows}x{launch.cols}x{launch.inner}{' bulk' if launch.tma else ''}",
            str(launch.warps),
            str(launch.stages),
            f"{row.tried - row.failed}/{row.tried}",
        )
    return table
