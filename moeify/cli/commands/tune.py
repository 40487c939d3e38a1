"""`moeify tune`: kernel launches for this GPU."""

from dataclasses import asdict

from moeify.cli import options as option
from moeify.options import TuneOptions


def tune_command(model: option.Moe, *, options: TuneOptions, output: option.Output) -> None:
    """Find the fastest kernel launches for this GPU.

    Of a model's experts; they are kept for this GPU.

    Example:
        moeify tune my-moe
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.tune import tune_table
    from moeify.kernels.tune_model import tune_model

    renderer = renderer_for(output)
    result = tune_model(model, **asdict(options), track=renderer.track)
    renderer.result(result, tune_table(result))
