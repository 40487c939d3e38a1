"""`moeify verify`: all experts on equals dense."""

from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.errors import CheckError


def verify_command(
    moe: option.Moe,
    *,
    dense: option.DenseModel,
    tolerance: option.Tolerance = 1e-4,
    output: option.Output,
) -> None:
    """Verify that a checkpoint is the dense model, cut: keys, neurons, and with all experts on every logit."""
    from moeify.check.verify import verify
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.verify import verify_table

    renderer = renderer_for(output)
    report = verify(moe, dense, tolerance=tolerance, track=renderer.track)
    step = command_line("eval", dense, moe) if report.passed else ""
    renderer.result(report, verify_table(report), next_step=step)
    if not report.passed:
        failed = [check.name for check in report.checks if not check.passed]
        raise CheckError(f"{moe} is not {dense}, cut: {', '.join(failed)}", "split it again")
