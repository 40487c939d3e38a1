"""The only file that prints: tables and one JSON object on stdout, progress and errors on stderr.

Names come from files and may hold anything. Whatever is printed is plain text: no markup, no emoji codes, and control
characters escaped, so that they reach no terminal. Cells that want a style are rich.text.Text. Not covered are lines
that compiled libraries print by themselves.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moeify.cli.options import Output
from moeify.cli.tables.columns import fitted
from moeify.errors import MoeifyError
from moeify.results import to_json
from moeify.words import duration, on_one_line, printable

# A loop shows its bar once it has taken this long.
PATIENCE_S = 2.0
# Without a terminal it prints a line this often instead.
LOG_EVERY_S = 20.0


class PlainConsole(Console):
    """A console that takes every string, of cells, titles and headers too, for plain text."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **styles: Any) -> Text:
        return super().render_str(printable(text), **{**styles, "markup": False, "emoji": False})


class PrintableFormatter(logging.Formatter):
    """Log lines of libraries, which quote what stands in files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Renderer:
    """Where a command's output goes.

    Args:
        as_json: print exactly one JSON object instead of tables.
        quiet: no tables and no progress; errors and JSON still appear.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._out = PlainConsole()
        self._err = PlainConsole(stderr=True)

    def track(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """Yield the items, with progress on stderr for a loop that takes more than PATIENCE_S."""
        if self._quiet:
            yield from items
            return
        label = on_one_line(label)
        if not self._err.is_terminal:
            yield from self._log(items, label, total)
            return
        began = time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
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
                self._err.print(f"{label}: {done}/{total}, about {left} left", soft_wrap=True)

    def announce(self, seconds: float) -> None:
        """Say on stderr what a search is going to take."""
        if not self._quiet:
            self._err.print(f"the search will take about {duration(seconds)}")

    def note(self, line: str) -> None:
        """A line on stderr that says what was done."""
        if not self._quiet:
            self._say(line)

    def error(self, error: BaseException) -> None:
        """`error: ...` and, if there is one, `hint: ...`."""
        self._say(f"error: {error}", style="red")
        if isinstance(error, MoeifyError) and error.hint:
            self._say(f"hint: {error.hint}")

    def warning(self, message: object) -> None:
        """`warning: ...`"""
        self._say(f"warning: {message}", style="yellow")

    def _say(self, line: str, style: str = "") -> None:
        # A name with a line break in it adds no line that looks like one of ours.
        self._err.print(on_one_line(line), style=style, soft_wrap=True)

    def lines(self, text: str) -> None:
        """Text of several lines on stderr: usage, tracebacks, warnings of libraries."""
        self._err.print(text.rstrip("\n"), soft_wrap=True)

    def document(self, value: Mapping[str, Any]) -> None:
        """Print one JSON object."""
        print(json.dumps(value, indent=1, allow_nan=False))

    def text(self, piece: str) -> None:
        """A piece of a model's text on stdout, as soon as it is there; of control characters only lines and tabs."""
        if not self._as_json:
            print("\t".join(map(printable, piece.split("\t"))), end="", flush=True)

    def ask(self, marker: str) -> str:
        """A line from whoever sits at the terminal; EOFError at its end.

        Raises:
            EOFError, KeyboardInterrupt: the end of the input, and Ctrl-C.
        """
        # Editing of lines and earlier ones; where it is not built in, the terminal's own is left.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        if sys.stdout.isatty():
            return input(marker)
        self._err.print(marker, end="")
        return input()

    def result(self, value: Any, *tables: Table, next_step: str = "") -> None:
        """Show a result: as one JSON object with its schema, or as tables and the command that comes next."""
        if self._as_json:
            self.document(to_json(value))
            return
        if self._quiet:
            return
        for table in tables:
            self._table(table)
        if next_step:
            self._out.print(f"next: {next_step}", soft_wrap=True)

    def _table(self, table: Table) -> None:
        """Its title, its cells in a form that fits, its notes, and an empty line."""
        if table.title:
            self._out.print(table.title, style="bold", soft_wrap=True)
        for number, part in enumerate(fitted(table, self._out.width)):
            if number:
                self._out.print()
            # Not cut where a single number is wider than the terminal.
            self._out.print(part, soft_wrap=True)
        if table.caption:
            self._out.print()
            self._out.print(table.caption)
        self._out.print()


def renderer_for(output: Output, *, loads_models: bool = True) -> Renderer:
    """The renderer of a command; unless it is verbose, the libraries below keep silent."""
    if loads_models:
        from transformers.utils import logging as library

        if not output.verbose:
            library.set_verbosity_error()
            library.disable_progress_bar()
        for handler in (*logging.getLogger("transformers").handlers, logging.lastResort):
            if handler is not None:
                handler.setFormatter(PrintableFormatter())
    return Renderer(as_json=output.json, quiet=output.quiet)


def traceback_of(error: BaseException) -> None:
    """The traceback of an error, on stderr."""
    import traceback

    Renderer().lines("".join(traceback.format_exception(error)))
