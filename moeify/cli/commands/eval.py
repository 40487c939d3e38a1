"""`moeify eval`: perplexity and speed."""

from dataclasses import asdict

from moeify.cli import options as option
from moeify.options import EvalOptions


def eval_command(models: option.Models, *, options: EvalOptions, output: option.Output) -> None:
    """Measure perplexity and speed on the same text.

    Example:
        moeify eval builtin my-moe --data text.txt
    """
    from moeify.check.evaluate import Evaluation, evaluate
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.eval import eval_table

    renderer = renderer_for(output)
    results = evaluate(models, **asdict(options), track=renderer.track)
    renderer.result(Evaluation(tuple(results)), eval_table(results))
