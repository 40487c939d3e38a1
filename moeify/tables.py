"""What the commands show: one function a result, each gives tables and prints nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from moeify.benchmark.model_results import ModelBench
    from moeify.benchmark.results import LayerBench
    from moeify.benchmark.table import Grid
    from moeify.compare import Comparison
    from moeify.evaluate import EvalResult
    from moeify.finetune import FinetuneResult
    from moeify.inspect import Inspection
    from moeify.listing import Listing
    from moeify.plan import Layout, SplitPlan
    from moeify.prepare import Preview
    from moeify.report import ReportResult
    from moeify.search import SearchResult
    from moeify.split import SplitResult
    from moeify.stages import RunPreview, RunResult
    from moeify.tune import TuneResult
    from moeify.verify import VerifyReport

# What `split --report` shows of a layer.
LAYER_COLUMNS = {
    "energy_kept": "energy kept",
    "energy_kept_static": "static",
    "energy_kept_oracle": "oracle",
    "oracle_gain_reached": "oracle gain reached",
    "error_without_refit": "error, no refit",
    "error_with_refit": "error, refit",
    "refit_strength": "refit strength",
    "smallest_expert_load": "least load",
    "largest_expert_load": "most load",
    "load_entropy": "load entropy",
}

FINETUNE_FIGURES = {
    "layer_error": "layer error",
    "kl": "KL to the teacher",
    "lm": "loss",
    "perplexity": "perplexity",
}


def key_value_table(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    for key, value in rows:
        table.add_row(key, value)
    return table


def size(num_bytes: float) -> str:
    """Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit in ("B", "kB") else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} TB"


def duration(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:,.0f} h"


def split_table(result: "SplitResult") -> Table:
    layout = result.layout
    last = [layer.diagnostics for layer in result.plan.layers]
    rows = [
        ("written to", str(result.out)),
        ("target", f"{result.target}: {result.target_reason}"),
        ("layout", layout_words(layout)),
        ("parameters", f"{result.num_parameters:,}"),
        (
            "active for a token",
            f"{result.num_active_parameters:,} ({result.num_active_parameters / result.num_parameters:.1%})",
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
    return key_value_table("moeify split", rows)


def layers_table(plan: "SplitPlan") -> Table:
    """What was measured in every layer."""
    table = Table(title="layers", title_justify="left")
    for column in ("layer", *LAYER_COLUMNS.values()):
        table.add_column(column, justify="right")
    for layer in plan.layers:
        values = [layer.diagnostics.get(name) for name in LAYER_COLUMNS]
        empty = "dense" if layer.layer in plan.layout.dense_layers else ""
        table.add_row(str(layer.layer), *(empty if value is None else f"{value:.3f}" for value in values))
    return table


def search_tables(found: "SearchResult") -> tuple[Table, ...]:
    """The choice beside uniform, then the frontier."""
    tables = []
    for title, points in (("moeify search", (found.found, found.uniform)), ("frontier", found.frontier)):
        table = Table(title=title, title_justify="left")
        table.add_column("strategy")
        for column in ("share", "active/experts", "dense layers", "KL, summed", "KL, together", "perplexity", "ratio"):
            table.add_column(column, justify="right", overflow="fold")
        for point in points:
            layout = point.layout
            table.add_row(
                point.strategy,
                f"{point.share:.1%}",
                f"{layout.num_active}/{layout.num_experts}",
                _ranges(layout.dense_layers),
                f"{point.predicted:.4f}",
                f"{point.divergence:.4f}",
                f"{point.perplexity:,.2f}",
                f"{point.perplexity / found.dense_perplexity:.3f}",
            )
        tables.append(table)
    return tuple(table for table in tables if table.row_count)


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"


def compare_tables(comparison: "Comparison") -> tuple[Table, Table]:
    """One row a method and budget: over all text with its intervals, then text by text."""
    over_all = Table(title=f"moeify compare {Path(comparison.model).name}", title_justify="left")
    by_text = Table(title="perplexity on each text", title_justify="left")
    for table in (over_all, by_text):
        table.add_column("method", overflow="fold", min_width=20)
        table.add_column("active", justify="right")
    for column in ("perplexity", "95 %", "to static + refit", "95 %", "gap closed"):
        over_all.add_column(column, justify="right", overflow="fold")
    for text in comparison.evaluation["tokens"]:
        by_text.add_column(Path(text).stem, justify="right", overflow="fold")
    for row in comparison.rows:
        over_all.add_row(
            row.method,
            f"{row.budget:.0%}",
            f"{row.perplexity:,.2f}",
            f"{row.low:,.1f} {row.high:,.1f}",
            f"{row.ratio:.3f}",
            f"{row.ratio_low:.3f} {row.ratio_high:.3f}",
            f"{row.gap_closed:.0%}",
        )
        by_text.add_row(row.method, f"{row.budget:.0%}", *(f"{value:,.1f}" for value in row.texts.values()))
    return over_all, by_text


def layout_words(layout: "Layout") -> str:
    if layout.is_static:
        return f"{layout.num_active} of {layout.num_experts} slices kept, the rest dropped"
    return (
        f"{layout.num_experts} slices: {layout.num_shared} shared + {layout.num_routed_active} of "
        f"{layout.num_routed} routed = {layout.active_share:.0%} of the FFN active"
        + (f"; dense layers: {_ranges(layout.dense_layers)}" if layout.dense_layers else "")
    )


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
            ("partition, router, refit", f"{options.partition}, {options.router}, {'yes' if options.refit else 'no'}"),
            (
                "calibration",
                f"{', '.join(options.calibration)}: {options.tokens:,} tokens in blocks of {options.context}",
            ),
            ("parameters", f"{preview.num_parameters:,}, {preview.num_active_parameters:,} active"),
            ("checkpoint", f"{size(estimate.checkpoint_bytes)} in {preview.dtype}"),
            ("memory", f"about {size(estimate.peak_memory_bytes)}"),
            ("time", f"about {duration(estimate.duration_s)} here"),
        ],
    )


def inspect_tables(inspection: "Inspection") -> tuple[Table, Table]:
    counts = [str(n) for n in inspection.expert_counts]
    estimate = inspection.estimate
    facts = key_value_table(
        f"moeify inspect {inspection.model}",
        [
            ("family", f"{inspection.family}, {inspection.dtype}"),
            ("parameters", f"{inspection.num_parameters:,}, {inspection.ffn_share:.0%} of them in FFNs"),
            ("FFN", f"{inspection.hidden_size:,} -> {inspection.num_neurons:,} in {inspection.num_layers} layers"),
            ("expert counts that work", ", ".join(counts)),
            (f"with --experts {inspection.experts}", layout_words(inspection.layout)),
            ("checkpoint, memory", f"{size(estimate.checkpoint_bytes)}, about {size(estimate.peak_memory_bytes)}"),
            ("time", f"about {duration(estimate.duration_s)} here"),
        ],
    )
    fits = Table(title="targets", title_justify="left")
    for column in ("target", "fits", "shared experts", "why"):
        fits.add_column(column, overflow="fold")
    for fit in inspection.targets:
        fits.add_row(fit.target, "yes" if fit.fits else "no", "yes" if fit.shared else "no", fit.reason)
    return facts, fits


def verify_table(report: "VerifyReport") -> Table:
    table = Table(title=f"moeify verify {report.moe}", title_justify="left")
    for column in ("check", "found", "expected", ""):
        table.add_column(column, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, check.found, check.expected, "ok" if check.passed else "FAILED")
    return table


def eval_table(results: "Sequence[EvalResult]") -> Table:
    """One row a model and text; the ratio is to the first model on the same text."""
    table = Table(title="moeify eval", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("text", overflow="fold")
    for column in ("perplexity", "ratio", "tokens", "tokens/s"):
        table.add_column(column, justify="right")
    first = {result.data: result.perplexity for result in reversed(results)}
    models = {result.model for result in results}
    short = {model: Path(model).name for model in models}
    if len(set(short.values())) < len(models):
        short = {model: model for model in models}
    for result in results:
        table.add_row(
            short[result.model],
            Path(result.data).name,
            f"{result.perplexity:,.3f}",
            f"{result.perplexity / first[result.data]:.3f}",
            f"{result.num_tokens:,}",
            f"{result.tokens_per_second:,.0f}",
        )
    return table


def layer_bench_tables(result: "LayerBench") -> tuple[Table, ...]:
    """For every pass and routing the peers side by side; last, where it was measured and what could not be."""
    from moeify.benchmark import table as layer_table

    return _grid_tables(layer_table.grids(result), "moeify bench --layer", layer_table.notes(result))


def model_bench_tables(result: "ModelBench") -> tuple[Table, ...]:
    """Compression, quality, speed, experts; where it was measured; verdicts last."""
    from moeify.benchmark import model_table

    tables = _grid_tables(model_table.grids(result), "moeify bench", model_table.notes(result))
    verdicts = Table(title="verdicts", title_justify="left", show_header=False, show_lines=True)
    for line in model_table.verdict_lines(result):
        verdicts.add_row(escape(line))
    return (*tables, verdicts) if verdicts.row_count else tables


def _grid_tables(grids: "Sequence[Grid]", title: str, notes: Sequence[str]) -> tuple[Table, ...]:
    tables = []
    for grid in grids:
        table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in grid.columns:
            table.add_column(column, justify="left" if column in grid.words else "right", overflow="fold")
        for line in grid.lines:
            table.add_row(*(escape(cell) for cell in line))
        tables.append(table)
    where = Table(title=title, title_justify="left", show_header=False)
    for note in notes:
        where.add_row(escape(note))
    return (*tables, where)


def finetune_table(result: "FinetuneResult") -> Table:
    """Each stage, before and after, on held-out text."""
    table = Table(title=f"moeify finetune {result.out}", title_justify="left")
    table.add_column("stage")
    table.add_column("figure")
    for column in ("before", "after", "tokens", "seconds"):
        table.add_column(column, justify="right")
    for stage in result.stages:
        for name, label in FINETUNE_FIGURES.items():
            if name in stage.after:
                seconds = "earlier" if stage.seconds is None else f"{stage.seconds:,.0f}"
                values = (f"{stage.before[name]:,.4f}", f"{stage.after[name]:,.4f}")
                table.add_row(stage.stage, label, *values, f"{stage.num_tokens:,}", seconds)
    return table


def run_tables(run: "RunResult") -> tuple[Table, ...]:
    gates = Table(title="gates", title_justify="left")
    for column in ("gate", "found", "limit", ""):
        gates.add_column(column)
    for gate in run.gates:
        gates.add_row(gate.name, gate.found, gate.limit, "ok" if gate.passed else "FAILED")
    evals = (eval_table(run.evals),) if run.evals else ()
    return (*evals, gates) if run.gates else evals


def run_preview_table(planned: "RunPreview") -> Table:
    table = Table(title=f"moeify run --dry-run, to {planned.out}", title_justify="left")
    table.add_column("split")
    table.add_column("target")
    for column in ("experts", "params", "active", "memory", "time"):
        table.add_column(column, justify="right")
    for name, preview in planned.splits.items():
        estimate, layout = preview.estimate, preview.layout
        experts = f"{layout.num_shared} + {layout.num_routed_active} of {layout.num_routed}"
        table.add_row(
            name,
            "dense, pruned" if layout.is_static else preview.target,
            f"{layout.num_active} of {layout.num_experts}" if layout.is_static else experts,
            f"{preview.num_parameters / 1e9:.2f} B",
            f"{preview.num_active_parameters / 1e9:.2f} B",
            size(estimate.peak_memory_bytes),
            "finished" if name in planned.finished else duration(estimate.duration_s),
        )
    table.caption = f"then: {', '.join(planned.further)}" if planned.further else None
    return table


def report_tables(result: "ReportResult") -> tuple[Table, ...]:
    """The first screen of the page, a table a mixture of experts, and where it was written."""

    def span(values: tuple[float, float] | None) -> str:
        return "not measured" if values is None else f"{values[0]:.2f} to {values[1]:.2f} times dense"

    tables = []
    for found in result.headlines:
        ratio, static = found.ratio, found.static_ratio
        rows = [
            ("should I use it?", found.answers.advice.sentence),
            ("what did I lose?", "\n".join(found.answers.lost)),
            ("what did I gain?", "\n".join(found.answers.gained)),
            (
                "perplexity / dense",
                "not measured" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})",
            ),
            ("the static control's", "none of this size" if static is None else f"{static.value:.3f}"),
            ("decode speed", span(found.decode_speed)),
            ("prefill speed", span(found.prefill_speed)),
        ]
        tables.append(key_value_table(escape(found.model), [(key, escape(value)) for key, value in rows]))
    rows = [("page", f"{escape(str(result.out))}, {size(result.num_bytes)}")]
    rows += [("note", escape(note)) for note in result.notes]
    return (*tables, key_value_table("moeify report", rows))


def tune_table(result: "TuneResult") -> Table:
    """What tuning gained, a row for each kernel and number of tokens."""
    shape = f"{result.num_ranks} of {result.num_experts} experts, {result.dim} x {result.width}"
    table = Table(title=f"{shape} on {result.device}", title_justify="left")
    table.add_column("kernel/rows")
    for header in ("tokens", "before us", "after us", "ratio", "tile", "warps", "stages", "tried"):
        table.add_column(header, justify="right")
    for row in result.kernels:
        found = row.launch
        table.add_row(
            row.key,
            str(row.tokens),
            f"{row.before_us:.1f}",
            f"{row.after_us:.1f}",
            f"{row.after_us / row.before_us:.2f}",
            f"{found.rows}x{found.cols}x{found.inner}{' bulk' if found.tma else ''}",
            str(found.warps),
            str(found.stages),
            f"{row.tried - row.failed}/{row.tried}",
        )
    return table


def list_table(listing: "Listing") -> Table:
    table = Table(title=listing.kind, title_justify="left")
    table.add_column("name")
    table.add_column("what it is", overflow="fold")
    for name, what in listing.entries.items():
        table.add_row(name, what)
    return table
