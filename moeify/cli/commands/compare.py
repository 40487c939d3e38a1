"""`moeify compare`: methods side by side."""

from pathlib import Path

from moeify.cli import options as option
from moeify.command_line import items
from moeify.options import CompareOptions


def compare_command(
    model: option.Model,
    *,
    options: CompareOptions,
    searched: option.Searched = [],  # noqa: B006
    trial: option.TrialOptions,
    out: option.CompareOut = None,
    output: option.Output,
) -> None:
    """Measure methods side by side in one run.

    Dense, neuron oracle, static pruning, published methods and ours, on the same tokens.

    Example:
        moeify compare builtin --budget 0.5 --method CMoE,static
    """
    from moeify.check.compare import compare
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.compare import compare_tables
    from moeify.convert.search_results import searched_rows

    renderer = renderer_for(output)
    result = compare(
        model,
        options.budget,
        options.data,
        trial,
        tokens=options.data_tokens,
        tasks=options.tasks,
        questions=options.questions,
        only=options.method,
        further=searched_rows([Path(file) for file in items(searched)]),
        out=out,
        track=renderer.track,
    )
    renderer.result(result, *compare_tables(result))
