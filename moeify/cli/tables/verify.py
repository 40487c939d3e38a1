"""The table of `moeify verify`."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from moeify.check.verify import VerifyReport


def verify_table(report: "VerifyReport") -> Table:
    table = Table(title=f"moeify verify {report.moe}", title_justify="left")
    for column in ("check", "found", "expected", ""):
        table.add_column(column, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, check.found, check.expected, "ok" if check.passed else "FAILED")
    return table
