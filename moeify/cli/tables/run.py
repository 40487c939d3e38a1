"""Tables of `moeify run`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.eval import eval_table
from moeify.words import count, duration, size

if TYPE_CHECKING:
    from moeify.recipes.run import RunPreview, RunResult


def run_tables(run: "RunResult") -> tuple[Table, ...]:
    columns = ("limit", "measured", "allowed", "")
    limits = DataTable("limits", columns, words=columns)
    for limit in run.limits:
        limits.add_row(limit.name, limit.measured, limit.allowed, "ok" if limit.passed else "FAILED")
    evals = (eval_table(run.evals),) if run.evals else ()
    return (*evals, limits) if run.limits else evals


def run_preview_table(plan: "RunPreview") -> DataTable:
    table = DataTable(
        f"moeify run --dry-run, to {plan.out}",
        ("split", "target", "experts", "parameters", "active", "memory", "time"),
        words=("split", "target"),
        notes=f"then: {', '.join(plan.further)}" if plan.further else "",
    )
    for name, preview in plan.splits.items():
        estimate, layout = preview.estimate, preview.layout
        experts = f"{layout.num_shared} + {layout.num_routed_active} of {layout.num_routed}"
        table.add_row(
            name,
            "dense, pruned" if layout.is_static else preview.target,
            f"{layout.num_active} of {layout.num_experts}" if layout.is_static else experts,
            count(preview.num_parameters),
            count(preview.num_active_parameters),
            size(estimate.peak_memory_bytes),
            "finished" if name in plan.finished else duration(estimate.duration_s),
        )
    return table
