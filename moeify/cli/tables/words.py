"""A table of keys and values; a layout, engines and blocks of text in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.words import percent, ranges

if TYPE_CHECKING:
    from moeify.engines import Verdict
    from moeify.layout import Layout


def key_value_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table("what", "value", title=title, show_header=False)
    for key, value in rows:
        table.add_row(key, value)
    return table


def layout_words(layout: "Layout", dropped: Sequence[int] = ()) -> str:
    if layout.is_whole:
        words = "every FFN whole"
    elif layout.active_by_layer:
        least = min(layout.experts_by_layer, default=layout.num_experts)
        experts = f"{least} to {layout.num_experts}" if least < layout.num_experts else layout.num_experts
        words = f"each FFN in {experts} experts: {layout.num_shared} shared, {counts_words(layout)}"
    elif layout.is_static:
        words = f"{layout.num_active} of {layout.num_experts} slices of each FFN kept, the others dropped"
    else:
        words = (
            f"each FFN in {layout.num_experts} experts: {layout.num_shared} shared + {layout.num_routed_active} of "
            f"{layout.num_routed} routed = {percent(layout.active_share)} active"
        )
    if layout.is_adaptive:
        words += f" in the mean, {layout.min_active} to {layout.max_active} for a token"
    if dropped:
        words = f"without layers {ranges(dropped)}, their attention, keys and values; {words}"
    return "; ".join([words, *layer_words(layout)])


def layer_words(layout: "Layout") -> list[str]:
    """Layers that are not as the others."""
    empty = [layer for layer, number in enumerate(layout.active_by_layer) if not number]
    kinds = {"dense layers": layout.dense_layers, "static layers": layout.static_layers, "layers without an FFN": empty}
    return [f"{kind}: {ranges(layers)}" for kind, layers in kinds.items() if layers]


def counts_words(layout: "Layout") -> str:
    """How many experts are active in layers that differ."""
    least, most = min(layout.cut_counts), max(layout.cut_counts)
    return f"{least} to {most} active by layer = {percent(layout.active_share)} of the layers that are cut"


def active_rows(
    layout: "Layout", layers: tuple[int, int], active: int, total: int, budget: float | None = None
) -> list[tuple[str, str]]:
    """The share of all FFN parameters that a token uses, which --budget bounds, and that of all parameters.

    Args:
        layout: how layers are cut.
        layers: how many there are, and how many were dropped.
        active, total: parameters.
        budget: as it was asked for.
    """
    share = percent(layout.model_share(*layers))
    allowed = "" if budget is None else f"; --budget {budget:g} allows {percent(budget)}"
    if layout.is_static:
        return [("kept of the FFNs", f"{share} of their parameters"), ("parameters", f"{total:,}")]
    return [
        ("active of the FFNs", f"{share} of their parameters{allowed}"),
        ("active of all", f"{active:,} of {total:,} parameters, {percent(active / total)}"),
    ]


def windows(context: int, stride: int | None = None) -> str:
    """How a text is cut for a measurement."""
    blocks = stride is None or stride == context
    return f"blocks of {context:,} tokens" if blocks else f"windows of {context:,} tokens, {stride:,} apart"


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
