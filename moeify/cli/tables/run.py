"""Tables of `moeify run`."""

from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.eval import eval_table
from moeify.cli.tables.tasks import tasks_tables
from moeify.words import duration, size

if TYPE_CHECKING:
    from moeify.recipes.run import RunPreview, RunResult


def run_tables(run: "RunResult") -> tuple[Table, ...]:
    limits = Table(title="limits", title_justify="left")
    for column in ("limit", "measured", "allowed", ""):
        limits.add_column(column)
    for limit in run.limits:
        limits.add_row(limit.name, limit.measured, limit.allowed, "ok" if limit.passed else "FAILED")
    evals = (eval_table(run.evals),) if run.evals else ()
    measured = (*evals, *tasks_tables(run.tasks))
    return (*measured, limits) if run.limits else measured


def run_preview_table(plan: "RunPreview") -> Table:
    table = Table(title=f"moeify run --dry-run, to {plan.out}", title_justify="left")
    table.add_column("split")
    table.add_column("target")
    for column in ("experts", "params", "active", "memory", "time"):
        table.add_column(column, justify="right")
    for name, preview in plan.splits.items():
        estimate, layout = preview.estimate, preview.layout
        experts = f"{layout.num_shared} + {layout.num_routed_active} of {layout.num_routed}"
        table.add_row(
            name,
            "dense, pruned" if layout.is_static else preview.target,
            f"{layout.num_active} of {layout.num_experts}" if layout.is_static else experts,
            f"{preview.num_parameters / 1e9:.2f} B",
            f"{preview.num_active_parameters / 1e9:.2f} B",
            size(estimate.peak_memory_bytes),
            "finished" if name in plan.finished else duration(estimate.duration_s),
        )
    table.caption = f"then: {', '.join(plan.further)}" if plan.further else None
    return table
