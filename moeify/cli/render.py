"""The only file that prints: tables and one JSON object on stdout, progress and errors on stderr.

Names come from files and may hold anything. Whatever is printed is plain text: no markup, no emoji codes, and control
characters escaped, so that they reach no terminal. Cells that want a style are rich.text.Text. Not covered are lines
that compiled libraries print by themselves.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from moeify.cli.options import Output
from moeify.cli.tables.columns import fitted
from moeify.errors import MoeifyError
from moeify.progress import PATIENCE_S, Clock
from moeify.results import schema_name, to_json
from moeify.words import duration, on_one_line, printable

# Without a terminal it prints a line this often instead.
LOG_EVERY_S = 20.0
# Results that lie on the disk or were shown as they came: --quiet says nothing of them.
SEEN = ("split", "finetune", "export", "tune", "report", "run", "init", "generate", "chat")


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


class PatientProgress(Progress):
    """A bar that appears once the loop has taken PATIENCE_S, also while its first item is not done."""

    began = math.inf

    def start(self) -> None:
        self.began = time.monotonic()
        super().start()

    def get_renderables(self) -> Iterable[RenderableType]:
        if time.monotonic() - self.began > PATIENCE_S:
            yield from super().get_renderables()


class LabelColumn(ProgressColumn):
    """The label, which gives way where a terminal is narrow."""

    def render(self, task: Task) -> Text:
        return Text(task.description, no_wrap=True, overflow="ellipsis")


class LeftColumn(ProgressColumn):
    """The time left, in the words of a log line."""

    def render(self, task: Task) -> Text:
        return Text(_left(task.fields["clock"]))


class Renderer:
    """Where a command's output goes.

    Args:
        as_json: print exactly one JSON object instead of tables.
        quiet: nothing but what was asked for: no progress, notes, next command or table of what lies on the disk;
            errors still appear.
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
        label, clock = on_one_line(label), Clock(items, total)
        if clock.num_finished:
            self.note(f"{label}: {clock.num_finished} of {total} are there from an earlier run")
        watched = self._with_bar if self._err.is_terminal else self._with_lines
        yield from watched(items, label, total, clock)

    def _with_bar(self, items: Iterable[Any], label: str, total: int, clock: Clock) -> Iterator[Any]:
        whole = Column(no_wrap=True)
        columns = (
            LabelColumn(),
            BarColumn(bar_width=12, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            LeftColumn(table_column=whole),
        )
        with PatientProgress(*columns, console=self._err, transient=True) as progress:
            task = progress.add_task(label, total=total, completed=clock.done, clock=clock)
            for item in items:
                yield item
                clock.tick()
                progress.update(task, completed=clock.done)

    def _with_lines(self, items: Iterable[Any], label: str, total: int, clock: Clock) -> Iterator[Any]:
        """Progress for a log file: a line now and then instead of a bar."""
        last = time.monotonic()
        for item in items:
            yield item
            clock.tick()
            if time.monotonic() - last > LOG_EVERY_S:
                last = time.monotonic()
                self._err.print(f"{label}: {clock.done}/{total}, {_left(clock)}".rstrip(", "), soft_wrap=True)

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
        if self._quiet and schema_name(type(value)) in SEEN:
            return
        for table in tables:
            self._table(table)
        if next_step and not self._quiet:
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


def _left(clock: Clock) -> str:
    seconds = clock.seconds_left()
    return "" if seconds is None else f"about {duration(seconds)} left"


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
