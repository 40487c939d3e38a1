"""The table of `moeify export`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.words import key_value_table
from moeify.command_line import quoted
from moeify.words import listing, percent, size

if TYPE_CHECKING:
    from moeify.export.gguf.result import ExportResult


def export_table(result: "ExportResult") -> Table:
    rows = [
        ("written to", str(result.file)),
        ("architecture", result.architecture),
        ("type", result.type),
        ("size", f"{size(result.num_bytes)} in {result.num_tensors:,} tensors"),
    ]
    if result.num_raw:
        words = f"{result.num_raw} tensors, {percent(result.raw_share)} of the weights, block by block"
        rows.append(("unchanged from the GGUF", words))
    if result.fallback:
        rows.append(("as f16 instead", f"{listing(result.fallback)}: {percent(result.fallback_share)} of the weights"))
    rows.append(("run it", quoted(["llama-completion", "-m", str(result.file), "-p", "Hello"])))
    return key_value_table("moeify export", rows)
