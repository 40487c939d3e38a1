"""The table of `moeify ls`."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from moeify.plugin_list import Listing


def list_table(listing: "Listing") -> Table:
    table = Table(title=listing.kind, title_justify="left")
    table.add_column("name")
    table.add_column("what it is", overflow="fold")
    for name, what in listing.entries.items():
        table.add_row(name, what)
    return table
