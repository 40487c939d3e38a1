"""`moeify inspect`: what a model is."""

from moeify.cli import options as option
from moeify.command_line import command_line


def inspect_command(model: option.Model, *, options: option.InspectOptions, output: option.Output) -> None:
    """Say what a model is, how it can be split, and what that takes.

    Example:
        moeify inspect builtin
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.inspect import inspect_tables
    from moeify.convert.inspection import inspect

    renderer = renderer_for(output)
    inspection = inspect(model, experts=options.experts, track=renderer.track)
    renderer.result(inspection, *inspect_tables(inspection), next_step=command_line("split", model, options))
