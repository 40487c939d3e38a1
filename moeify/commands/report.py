"""`moeify report`: what was lost and gained, as one page."""

from moeify import cli_options as option


def report_command(
    run_dir: option.RunDir,
    out: option.ReportOut = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Write one HTML page that says what was lost and gained by turning a dense model into a mixture of experts."""
    from moeify.render import renderer_for
    from moeify.report import report
    from moeify.tables.report import report_tables

    renderer = renderer_for(json, quiet, verbose, loads_models=False)
    result = report(run_dir, out)
    renderer.result("report", result, *report_tables(result), next_step=f"open {result.out} in a browser")
