"""The table of `moeify ls`."""

from typing import TYPE_CHECKING

from moeify.cli.tables.columns import DataTable

if TYPE_CHECKING:
    from moeify.plugin_list import Listing


def list_table(listing: "Listing") -> DataTable:
    columns = ("name", "what it is")
    table = DataTable(listing.kind, columns, words=columns)
    for name, what in listing.entries.items():
        table.add_row(name, what)
    return table
