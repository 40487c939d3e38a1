"""`moeify verify`: all experts on equals dense."""

from moeify.cli import options as option
from moeify.errors import CheckError


def verify_command(
    moe: option.Moe,
    dense: option.DenseModel,
    tolerance: option.Tolerance = 1e-4,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Prove that a checkpoint is the dense model, cut: every key, every neuron, and with all experts on every logit."""
    from moeify.check.verify import verify
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.verify import verify_table

    renderer = renderer_for(json, quiet, verbose)
    report = verify(moe, dense, tolerance=tolerance, track=renderer.track)
    renderer.result(
        "verify",
        {"passed": report.passed, **vars(report)},
        verify_table(report),
        next_step=f"moeify eval {dense} {moe}" if report.passed else "",
    )
    if not report.passed:
        failed = [check.name for check in report.checks if not check.passed]
        raise CheckError(f"{moe} is not {dense}, cut: {', '.join(failed)}", "split it again")
