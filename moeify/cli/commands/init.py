"""`moeify init`: a recipe to begin with."""

from pathlib import Path

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.options import MachineOptions


def init_command(
    model: option.Model,
    *,
    options: MachineOptions,
    out: option.RecipeOut = None,
    overwrite: option.Overwrite = False,
    output: option.Output,
) -> None:
    """Write a commented recipe for this model and machine.

    Example:
        moeify init builtin -o my-recipe.yaml
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.init import init_table
    from moeify.recipes.init import init

    renderer = renderer_for(output)
    file = out or Path(f"{option.beside(model, 'recipe')}.yaml")
    result = init(model, file, options, overwrite=overwrite, track=renderer.track)
    step = command_line("run", str(result.file), dry_run=True)
    renderer.result(result, init_table(result), next_step=step)
