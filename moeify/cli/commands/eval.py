"""`moeify eval`: perplexity, speed and tasks."""

from moeify.cli import options as option
from moeify.options import EvalOptions


def eval_command(models: option.Models, *, options: EvalOptions, output: option.Output) -> None:
    """Measure perplexity, speed and answers on the same text.

    Example:
        moeify eval builtin my-moe --data text.txt
    """
    from moeify.check.evaluate import measure
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.eval import eval_tables

    renderer = renderer_for(output)
    evaluation = measure(models, options, track=renderer.track)
    renderer.result(evaluation, *eval_tables(evaluation))
