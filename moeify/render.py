"""The only file that prints: tables and one JSON object on stdout, progress and errors on stderr."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moeify.errors import MoeifyError

if TYPE_CHECKING:
    from moeify.compare import Comparison
    from moeify.evaluate import EvalResult
    from moeify.finetune import FinetuneResult
    from moeify.inspect import Inspection
    from moeify.plan import SplitPlan
    from moeify.prepare import Preview
    from moeify.recipe import RunResult
    from moeify.search import SearchResult
    from moeify.split import SplitResult
    from moeify.verify import VerifyReport

# A loop shows its bar once it has taken this long.
PATIENCE_S = 2.0
# Without a terminal it prints a line this often instead.
LOG_EVERY_S = 20.0


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


class Renderer:
    """Where a command's output goes.

    Args:
        as_json: print exactly one JSON object instead of tables.
        quiet: no tables and no progress; errors and JSON still appear.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._out = Console()
        self._err = Console(stderr=True)

    def track(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """Yield the items, with progress on stderr for a loop that takes more than PATIENCE_S."""
        if self._quiet:
            yield from items
            return
        if not self._err.is_terminal:
            yield from self._log(items, label, total)
            return
        began = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self._err, transient=True) as progress:
            task = progress.add_task(label, total=total, visible=False)
            for item in items:
                yield item
                progress.update(task, advance=1, visible=time.monotonic() - began > PATIENCE_S)

    def _log(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """Progress for a log file: a line now and then instead of a bar."""
        began = last = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            if time.monotonic() - last > LOG_EVERY_S:
                last = time.monotonic()
                left = duration((last - began) / done * (total - done))
                line = f"{label}: {done}/{total}, about {left} left"
                self._err.print(line, markup=False, highlight=False, soft_wrap=True)

    def announce(self, seconds: float) -> None:
        """Say on stderr what a command is going to take."""
        if not self._quiet:
            self._err.print(f"this will take about {duration(seconds)}", highlight=False)

    def error(self, error: BaseException) -> None:
        """`error: ...` and, if there is one, `hint: ...`."""
        self._err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, MoeifyError) and error.hint:
            self._err.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)

    def result(self, command: str, value: Any, *tables: Table, next_step: str = "") -> None:
        """Show a result: as one JSON object with its schema, or as tables and the command that comes next."""
        if self._as_json:
            print(json.dumps({"schema": f"moeify.{command}/1", **_plain(value)}, indent=1, allow_nan=False))
            return
        if self._quiet:
            return
        for table in tables:
            self._out.print(table)
        if next_step:
            self._out.print(f"next: {next_step}", markup=False, highlight=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    """JSON-able copy of dataclasses, paths and tensors' owners; a plan's tensors are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _plain(item) for name, item in fields.items() if not _is_tensor(item)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _is_tensor(value: Any) -> bool:
    return type(value).__module__ == "torch"


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
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


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


def compare_table(comparison: "Comparison") -> Table:
    """One row a method and budget."""
    table = Table(title=f"moeify compare {comparison.model}", title_justify="left")
    table.add_column("method", overflow="fold")
    for column in ("active", "perplexity (95 %)", "/ static + refit (95 %)", "gap closed"):
        table.add_column(column, justify="right")
    for text in comparison.evaluation["tokens"]:
        table.add_column(Path(text).stem, justify="right")
    for row in comparison.rows:
        table.add_row(
            row.method,
            f"{row.budget:.1%}",
            f"{row.perplexity:,.2f} ({row.low:,.1f}-{row.high:,.1f})",
            f"{row.ratio:.3f} ({row.ratio_low:.3f}-{row.ratio_high:.3f})",
            f"{row.gap_closed:.0%}",
            *(f"{value:,.1f}" for value in row.texts.values()),
        )
    return table


def layout_words(layout: Any) -> str:
    if layout.is_static:
        return f"{layout.num_active} of {layout.num_experts} slices kept, the rest dropped"
    return (
        f"{layout.num_experts} slices: {layout.num_shared} shared + {layout.num_routed_active} of "
        f"{layout.num_routed} routed = {layout.active_share:.0%} of the FFN active"
        + (f"; layers {_ranges(layout.dense_layers)} stay dense" if layout.dense_layers else "")
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


FINETUNE_FIGURES = {
    "layer_error": "layer error",
    "kl": "KL to the teacher",
    "lm": "loss",
    "perplexity": "perplexity",
}


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


def list_table(kind: str, entries: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=kind, title_justify="left")
    table.add_column("name")
    table.add_column("what it is", overflow="fold")
    for name, what in entries:
        table.add_row(name, what)
    return table


def traceback_of(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error, file=sys.stderr)
