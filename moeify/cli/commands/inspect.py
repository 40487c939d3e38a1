"""`moeify inspect`: what a model is."""

from typing import Annotated

import typer

from moeify.cli import options as option
from moeify.options import SplitOptions

DEFAULTS = SplitOptions()


def inspect_command(
    model: option.Model,
    experts: Annotated[int, typer.Option(help="Experts the estimates are made for.")] = DEFAULTS.experts,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Say what a model is, how it can be split, which targets hold it, and what that takes."""
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.inspect import inspect_tables
    from moeify.convert.inspection import inspect

    renderer = renderer_for(json, quiet, verbose)
    found = inspect(model, experts=experts, track=renderer.track)
    step = f"moeify split {model} --experts {found.experts}"
    renderer.result("inspect", found, *inspect_tables(found), next_step=step)
