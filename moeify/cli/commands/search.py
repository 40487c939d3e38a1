"""`moeify search`: what to cut under a budget."""

from dataclasses import replace

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.options import SearchOptions


def search_command(
    model: option.Model,
    *,
    options: SearchOptions,
    candidate: option.CandidateOptions,
    out: option.SearchOut = None,
    output: option.Output,
) -> None:
    """Choose which layers stay dense and how the others are cut.

    Under a budget; a search that was stopped goes on.

    Example:
        moeify search builtin --experts 8 --budget 0.6
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.search import search_tables
    from moeify.convert.search import search
    from moeify.convert.search_results import check_drawable, write_frontier
    from moeify.reporting.drawings import search_plot

    renderer = renderer_for(output)
    if out is not None:
        check_drawable(out)
    result = search(
        model,
        options.budget,
        candidate,
        strategy=options.strategy,
        trials=options.trials,
        depth=options.depth,
        track=renderer.track,
        announce=renderer.note,
    )
    if out is not None:
        write_frontier(result, out, search_plot(result).file())
    split = command_line("split", model, replace(candidate, **result.options))
    renderer.result(result, *search_tables(result), next_step=split)
