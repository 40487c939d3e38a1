"""The table of `moeify verify`."""

from typing import TYPE_CHECKING

from moeify.cli.tables.columns import DataTable

if TYPE_CHECKING:
    from moeify.check.verify import VerifyReport


def verify_table(report: "VerifyReport") -> DataTable:
    columns = ("check", "found", "expected", "")
    table = DataTable(f"moeify verify {report.moe}", columns, words=columns)
    for check in report.checks:
        table.add_row(check.name, check.found, check.expected, "ok" if check.passed else "FAILED")
    return table
