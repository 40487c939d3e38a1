"""The only file that prints: tables and one JSON object on stdout, progress and errors on stderr."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moeify.cli.options import Output
from moeify.errors import MoeifyError
from moeify.results import to_json
from moeify.words import duration, printable

# A loop shows its bar once it has taken this long.
PATIENCE_S = 2.0
# Without a terminal it prints a line this often instead.
LOG_EVERY_S = 20.0


class Renderer:
    """Where a command's output goes.

    Args:
        as_json: print exactly one JSON object instead of tables.
        quiet: no tables and no progress; errors and JSON still appear.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._out = Console()
        self._err = Console(stderr=True)

    def track(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """Yield the items, with progress on stderr for a loop that takes more than PATIENCE_S."""
        if self._quiet:
            yield from items
            return
        if not self._err.is_terminal:
            yield from self._log(items, label, total)
            return
        began = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self._err, transient=True) as progress:
            task = progress.add_task(label, total=total, visible=False)
            for item in items:
                yield item
                progress.update(task, advance=1, visible=time.monotonic() - began > PATIENCE_S)

    def _log(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """Progress for a log file: a line now and then instead of a bar."""
        began = last = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            if time.monotonic() - last > LOG_EVERY_S:
                last = time.monotonic()
                left = duration((last - began) / done * (total - done))
                line = f"{label}: {done}/{total}, about {left} left"
                self._err.print(line, markup=False, highlight=False, soft_wrap=True)

    def announce(self, seconds: float) -> None:
        """Say on stderr what a search is going to take."""
        if not self._quiet:
            self._err.print(f"the search will take about {duration(seconds)}", highlight=False)

    def error(self, error: BaseException) -> None:
        """`error: ...` and, if there is one, `hint: ...`."""
        self._say(f"error: {error}", style="red")
        if isinstance(error, MoeifyError) and error.hint:
            self._say(f"hint: {error.hint}")

    def warning(self, message: object) -> None:
        """`warning: ...`"""
        self._say(f"warning: {message}", style="yellow")

    def _say(self, line: str, style: str = "") -> None:
        self._err.print(printable(line), style=style, markup=False, highlight=False, soft_wrap=True)

    def document(self, value: Mapping[str, Any]) -> None:
        """Print one JSON object."""
        print(json.dumps(value, indent=1, allow_nan=False))

    def result(self, value: Any, *tables: Table, next_step: str = "") -> None:
        """Show a result: as one JSON object with its schema, or as tables and the command that comes next."""
        if self._as_json:
            self.document(to_json(value))
            return
        if self._quiet:
            return
        for table in tables:
            self._out.print(table)
        if next_step:
            self._out.print(f"next: {next_step}", markup=False, highlight=False, soft_wrap=True)


def renderer_for(output: Output, *, loads_models: bool = True) -> Renderer:
    """The renderer of a command; unless it is verbose, the libraries below keep silent."""
    if loads_models and not output.verbose:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return Renderer(as_json=output.json, quiet=output.quiet)


def traceback_of(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error, file=sys.stderr)
