"""`moeify inspect`: what a model is."""

from dataclasses import replace

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.options import SplitOptions


def inspect_command(
    model: option.Model,
    *,
    options: option.InspectOptions,
    draft_family: option.DraftFamily = False,
    output: option.Output,
) -> None:
    """Say what a model is, how it can be split, and what that takes.

    Of a family that moeify does not know --draft-family prints the file that it would need.

    Example:
        moeify inspect builtin
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.inspect import inspect_tables
    from moeify.convert.inspection import inspect

    renderer = renderer_for(output)
    if draft_family:
        from moeify.convert.draft import draft

        drafted = draft(model, track=renderer.track)
        renderer.text(drafted.text)
        renderer.result(drafted)
        return
    inspection = inspect(model, experts=options.experts, track=renderer.track)
    # A number of experts that does not work was looked at in the one that would be taken.
    split = SplitOptions(experts=inspection.experts if options.experts else None)
    if not any(fit.fits for fit in inspection.targets):
        split = replace(split, static=True)
    renderer.result(inspection, *inspect_tables(inspection), next_step=command_line("split", model, split))
