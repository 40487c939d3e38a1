"""Tables of `moeify run`."""

import math
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.eval import eval_table, score_table
from moeify.cli.tables.loops import loops_tables
from moeify.cli.tables.tasks import tasks_tables
from moeify.words import duration, size

if TYPE_CHECKING:
    from moeify.recipes.preview import RunPreview
    from moeify.recipes.run import RunResult


def run_tables(run: "RunResult") -> tuple[Table, ...]:
    columns = ("limit", "measured", "allowed", "")
    limits = DataTable("limits", columns, words=columns)
    for limit in run.limits:
        limits.add_row(limit.name, limit.measured, limit.allowed, "ok" if limit.passed else "FAILED")
    evals = (*([eval_table(run.evals)] if run.evals else []), *([score_table(run.scores)] if run.scores else []))
    measured = (*evals, *tasks_tables(run.tasks), *loops_tables(run.loops))
    return (*measured, limits) if run.limits else measured


def run_preview_table(plan: "RunPreview") -> DataTable:
    """A row a stage."""
    total = (
        f"about {duration(plan.duration_s)} in all; {size(plan.disk_bytes)} of {size(plan.free_bytes)} that are free"
    )
    table = DataTable(
        f"moeify run --dry-run, to {plan.out}",
        ("stage", "what it does", "time", "disk", "memory"),
        words=("stage", "what it does"),
        notes=total,
    )
    for stage in plan.stages:
        if stage.finished:
            table.add_row(stage.name, stage.what, "finished", "", "")
            continue
        disk = size(stage.disk_bytes) if stage.disk_bytes else ""
        time = "?" if math.isnan(stage.duration_s) else duration(stage.duration_s)
        table.add_row(stage.name, stage.what, time, disk, size(stage.peak_memory_bytes))
    return table
