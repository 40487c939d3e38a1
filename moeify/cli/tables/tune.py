"""The table of `moeify tune`."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from moeify.kernels.tune_model import TuneResult


def tune_table(result: "TuneResult") -> Table:
    """What tuning gained, a row for each kernel and number of tokens."""
    shape = f"{result.num_ranks} of {result.num_experts} experts, {result.dim} x {result.width}"
    table = Table(title=f"{shape} on {result.device}", title_justify="left")
    table.add_column("kernel/rows")
    for header in ("tokens", "before us", "after us", "ratio", "tile", "warps", "stages", "tried"):
        table.add_column(header, justify="right")
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
