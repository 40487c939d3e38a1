"""The table of `moeify init`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.words import key_value_table, layout_words

if TYPE_CHECKING:
    from moeify.recipes.init import InitResult


def init_table(result: "InitResult") -> Table:
    return key_value_table(
        f"moeify init {result.model}",
        [
            ("recipe", str(result.file)),
            ("target", result.target or "none: pruned, as a smaller dense model"),
            ("layout", layout_words(result.layout) if result.target else f"{result.layout.num_active} slices kept"),
            ("why", result.reason),
            ("runs on", result.device),
        ],
    )
