"""A table of keys and values, and a layout in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.words import ranges

if TYPE_CHECKING:
    from moeify.plan import Layout


def key_value_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for key, value in rows:
        table.add_row(key, value)
    return table


def layout_words(layout: "Layout") -> str:
    if layout.is_static:
        return f"{layout.num_active} of {layout.num_experts} slices kept, the rest dropped"
    return (
        f"{layout.num_experts} slices: {layout.num_shared} shared + {layout.num_routed_active} of "
        f"{layout.num_routed} routed = {layout.active_share:.0%} of the FFN active"
        + (f"; dense layers: {ranges(layout.dense_layers)}" if layout.dense_layers else "")
    )
