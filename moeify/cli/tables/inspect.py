"""Tables of `moeify inspect`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.words import engine_rows, key_value_table, layout_words
from moeify.words import duration, explained, percent, size

if TYPE_CHECKING:
    from moeify.convert.inspection import Inspection


def inspect_tables(inspection: "Inspection") -> tuple[Table, Table]:
    counts = [str(n) for n in inspection.expert_counts]
    estimate, width = inspection.estimate, inspection.layout.expert_width(inspection.num_neurons)
    facts = key_value_table(
        f"moeify inspect {inspection.model}",
        [
            ("family", f"{inspection.family}, {inspection.dtype}"),
            ("parameters", f"{inspection.num_parameters:,}, {percent(inspection.ffn_share)} of them in FFNs"),
            ("FFN", f"{inspection.hidden_size:,} -> {inspection.num_neurons:,} in {inspection.num_layers} layers"),
            ("expert counts that work", ", ".join(counts)),
            (f"with --experts {inspection.experts}", f"{layout_words(inspection.layout)}; {width:,} neurons an expert"),
            *engine_rows(inspection.engines),
            ("checkpoint, memory", f"{size(estimate.checkpoint_bytes)}, about {size(estimate.peak_memory_bytes)}"),
            ("time", f"about {duration(estimate.duration_s)} here"),
        ],
    )
    columns = ("target", "exact", "shared experts", "why")
    fits = DataTable("targets", columns, words=columns, notes=explained("exact", "shared"))
    for fit in inspection.targets:
        fits.add_row(fit.target, "yes" if fit.fits else "no", "yes" if fit.shared else "no", fit.reason)
    return facts, fits
