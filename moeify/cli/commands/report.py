"""`moeify report`: what was lost and gained, as one page."""

from moeify.cli import options as option


def report_command(
    run_dir: option.RunDir,
    out: option.ReportOut = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Write one HTML page that says what was lost and gained by turning a dense model into a mixture of experts."""
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.report import report_tables
    from moeify.reporting.report import report

    renderer = renderer_for(json, quiet, verbose, loads_models=False)
    result = report(run_dir, out)
    renderer.result("report", result, *report_tables(result), next_step=f"open {result.out} in a browser")
