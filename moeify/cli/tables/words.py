"""A table of keys and values, and a layout in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.words import ranges

if TYPE_CHECKING:
    from moeify.engines import Verdict
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


def engine_rows(verdicts: Sequence["Verdict"]) -> list[tuple[str, str]]:
    """Which engines that know the target run the layout, and how; no row for a pruned model."""
    if not verdicts:
        return []
    kinds = {
        "take it": [verdict.engine for verdict in verdicts if not verdict.refusal and not verdict.caution],
        "run it slowly": [verdict.engine for verdict in verdicts if verdict.caution and not verdict.refusal],
        "cannot run it": [verdict.engine for verdict in verdicts if verdict.refusal],
    }
    words = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    notes = [(verdict.engine, verdict.note) for verdict in verdicts if verdict.note]
    return [("engines", words), *notes]
