"""Tables of `moeify run`."""

import math
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
    """A row a stage; it is no wider than 80 columns."""
    table = Table(title=f"moeify run --dry-run, to {plan.out}", title_justify="left")
    table.add_column("stage", overflow="fold")
    table.add_column("what it does", overflow="fold")
    for column in ("time", "disk", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        if stage.finished:
            table.add_row(stage.name, stage.what, "finished", "", "")
            continue
        disk = size(stage.disk_bytes) if stage.disk_bytes else ""
        time = "?" if math.isnan(stage.duration_s) else duration(stage.duration_s)
        table.add_row(stage.name, stage.what, time, disk, size(stage.peak_memory_bytes))
    table.caption = (
        f"about {duration(plan.duration_s)} in all; {size(plan.disk_bytes)} of {size(plan.free_bytes)} that are free"
    )
    table.caption_justify = "left"
    return table
