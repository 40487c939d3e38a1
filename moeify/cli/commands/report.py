"""`moeify report`: what was lost and gained, as one page."""

import shutil
import sys

from moeify.cli import options as option
from moeify.command_line import quoted


def report_command(run_dir: option.RunDir, *, out: option.ReportOut = None, output: option.Output) -> None:
    """Write one HTML page: what was lost, and what was gained.

    Example:
        moeify report my-bench
    """
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.report import report_tables
    from moeify.reporting.report import report

    result = report(run_dir, out)
    python = "python" if shutil.which("python") else sys.executable
    step = "" if result.out.suffix == ".md" else quoted([python, "-m", "webbrowser", str(result.out)])
    renderer_for(output, loads_models=False).result(result, *report_tables(result), next_step=step)
