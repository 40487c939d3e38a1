"""`moeify run`: a recipe."""

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.errors import CheckError


def run_recipe_command(
    recipe: option.Recipe,
    *,
    set_: option.Overrides = [],  # noqa: B006
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    dry_run: option.DryRun = False,
    output: option.Output,
) -> None:
    """Run a recipe: split, controls, verify, train, measure, limits.

    Finished stages are skipped.

    Example:
        moeify run quickstart --set split.experts=16
    """
    from moeify.benchmark.models.run import FILE as BENCH_FILE
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.run import run_preview_table, run_tables
    from moeify.recipes.preview import preview_run
    from moeify.recipes.run import run

    renderer = renderer_for(output)
    if dry_run:
        step = command_line("run", recipe, set=set_, out=out, overwrite=overwrite)
        plan = preview_run(recipe, set_, out=out, overwrite=overwrite, track=renderer.track)
        renderer.result(plan, run_preview_table(plan), next_step=step)
        return
    result = run(recipe, set_, out=out, overwrite=overwrite, track=renderer.track, announce=renderer.note)
    step = command_line("report", str(result.out)) if (result.out / BENCH_FILE).is_file() else ""
    renderer.result(result, *run_tables(result), next_step=step)
    if not result.passed:
        failed = [limit.name for limit in result.limits if not limit.passed]
        raise CheckError(f"limits exceeded: {', '.join(failed)}", f"see {result.out / 'run.json'}")
