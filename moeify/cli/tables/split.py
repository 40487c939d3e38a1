"""Tables of `moeify split`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.words import active_rows, engine_rows, key_value_table, layout_words
from moeify.convert.text_size import text_need
from moeify.words import duration, explained, size

if TYPE_CHECKING:
    from moeify.convert.pipeline import SplitResult
    from moeify.convert.preview import Preview
    from moeify.plan import SplitPlan
    from moeify.training.within import TimedSplit


# What `split --report` shows of a layer.
LAYER_COLUMNS = {
    "energy_kept": "energy kept",
    "energy_kept_static": "static",
    "energy_kept_oracle": "oracle",
    "oracle_gain_reached": "gain reached",
    "error_without_refit": "error, no refit",
    "error_with_refit": "error, refit",
    "refit_strength": "refit strength",
    "active_experts": "experts active",
    "smallest_expert_load": "least load",
    "largest_expert_load": "most load",
    "load_entropy": "load entropy",
}


def split_table(result: "SplitResult") -> Table:
    layout = result.layout
    last = [layer.diagnostics for layer in result.plan.layers]
    rows = [
        ("written to", str(result.out)),
        ("target", f"{result.target}: {result.target_reason}"),
        ("layout", layout_words(layout, result.plan.options.drop_layers)),
        ("expert width", f"{result.expert_width:,} neurons"),
        *engine_rows(result.engines),
        *active_rows(
            layout,
            (len(result.plan.layers), len(result.plan.options.drop_layers)),
            result.num_active_parameters,
            result.num_parameters,
            result.plan.options.budget,
        ),
    ]
    for key, label in (
        ("error_without_refit", "layer error, no refit"),
        ("error_with_refit", "layer error, refit"),
        ("router_energy_of_oracle", "router / oracle energy"),
    ):
        values = [d[key] for d in last if key in d]
        if values:
            rows.append((label, f"{sum(values) / len(values):.4f} (mean of {len(values)} layers)"))
    if need := text_need(result.plan.layers):
        tokens = result.plan.calibration.get("num_tokens", 0)
        words = f"{need.half:.4f} of half, {need.all:.4f} of all, about {need.twice:.4f} of {2 * tokens:,}"
        rows.append(("error by tokens", f"{words} ({-need.gain:+.0%})"))
    if not any(last):
        rows.append(("layer error", "not measured: the plan was taken over, and no text was read"))
    table = key_value_table("moeify split", rows)
    table.caption = "`moeify ls words` says what shared, routed, refit and oracle mean"
    return table


def timed_table(result: "TimedSplit") -> Table:
    """What was made in the time that was given, and what that went to."""
    plan, dropped = result.plan, result.plan.options.drop_layers
    rows = [
        ("written to", str(result.out)),
        ("target", result.target),
        ("layout", layout_words(plan.layout, dropped)),
        *active_rows(
            plan.layout,
            (len(plan.layers), len(dropped)),
            result.num_active_parameters,
            result.num_parameters,
            plan.options.budget,
        ),
        ("calibration", f"{plan.options.tokens:,} tokens"),
        *((f"{work} took", duration(seconds)) for work, seconds in result.seconds.items()),
    ]
    return key_value_table("moeify split", rows)


def layers_table(plan: "SplitPlan") -> Table:
    """What was measured in every layer."""
    notes = explained("energy", "static", "oracle", "gain reached", "refit", "load")
    table = DataTable("layers", ("layer", *LAYER_COLUMNS.values()), notes=notes)
    for layer in plan.layers:
        values = [layer.diagnostics.get(name) for name in LAYER_COLUMNS]
        own = plan.layout.of_layer(layer.layer)
        empty = "dense" if own.is_whole else "no FFN" if own.is_empty else ""
        table.add_row(str(layer.layer), *(empty if value is None else f"{value:.3f}" for value in values))
    return table


def preview_table(preview: "Preview") -> Table:
    estimate = preview.estimate
    options = preview.options
    return key_value_table(
        "moeify split --dry-run",
        [
            ("model", f"{preview.model} ({preview.family}, {preview.num_layers} layers)"),
            ("target", f"{preview.target}: {preview.target_reason}"),
            ("layout", layout_words(preview.layout)),
            ("expert width", f"{preview.expert_width:,} neurons"),
            *engine_rows(preview.engines),
            ("partition, router, refit", f"{options.partition}, {options.router}, {'yes' if options.refit else 'no'}"),
            (
                "calibration",
                f"{', '.join(options.calibration)}: {options.tokens:,} tokens in blocks of {options.context}",
            ),
            *active_rows(
                preview.layout,
                (preview.num_layers, len(preview.options.drop_layers)),
                preview.num_active_parameters,
                preview.num_parameters,
            ),
            ("checkpoint", f"{size(estimate.checkpoint_bytes)} in {preview.dtype}"),
            ("memory", f"about {size(estimate.peak_memory_bytes)}"),
            ("time", f"about {duration(estimate.duration_s)} here"),
        ],
    )
