"""`moeify verify`: all experts on equals dense."""

from moeify.benchmark.options import BenchOptions
from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.errors import CheckError


def verify_command(
    moe: option.Moe,
    *,
    dense: option.DenseModel,
    exactness: option.Exactness,
    output: option.Output,
) -> None:
    """Verify that a checkpoint is the dense model, cut.

    Keys, neurons, and every logit with all experts on. A .gguf file is read back without llama.cpp: metadata,
    tokenizer, every neuron, every other tensor, but no logits.

    Example:
        moeify verify my-moe --dense builtin
    """
    from moeify.benchmark.engines.programs import BENCH, find
    from moeify.check.verify import is_gguf, verify
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.verify import verify_table

    renderer = renderer_for(output)
    report = verify(moe, dense, tolerance=exactness.tolerance, track=renderer.track)
    step = command_line("eval", dense, moe)
    if is_gguf(moe):
        # Logits need an engine.
        step = command_line("bench", moe, BenchOptions(engine=("llama.cpp",)), against=dense) if find(BENCH) else ""
    step = step if report.passed else ""
    renderer.result(report, verify_table(report), next_step=step)
    if not report.passed:
        failed = [check.name for check in report.checks if not check.passed]
        raise CheckError(
            f"{moe} is not {dense}, cut: {', '.join(failed)}", "export it again" if is_gguf(moe) else "split it again"
        )
