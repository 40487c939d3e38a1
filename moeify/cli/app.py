"""The command line: which commands there are, and what exit code every outcome has.

Nothing heavy is imported before a command runs.
"""

import io
import re
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import typer

from moeify.cli import options as option
from moeify.cli.commands.bench import bench_command
from moeify.cli.commands.bench_layer import bench_layer_command
from moeify.cli.commands.chat import chat_command
from moeify.cli.commands.compare import compare_command
from moeify.cli.commands.eval import eval_command
from moeify.cli.commands.export import export_command
from moeify.cli.commands.finetune import finetune_command
from moeify.cli.commands.generate import generate_command
from moeify.cli.commands.init import init_command
from moeify.cli.commands.inspect import inspect_command
from moeify.cli.commands.ls import list_command
from moeify.cli.commands.plan import plan_command
from moeify.cli.commands.report import report_command
from moeify.cli.commands.run import run_recipe_command
from moeify.cli.commands.schema import schema_command
from moeify.cli.commands.search import search_command
from moeify.cli.commands.split import split_command
from moeify.cli.commands.tune import tune_command
from moeify.cli.commands.verify import verify_command
from moeify.cli.help import Command, Description, Group, usage_error
from moeify.command_line import quoted
from moeify.errors import MoeifyError, MoeifyWarning, UsageError

# In the order of the help.
COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect_command,
    "plan": plan_command,
    "split": split_command,
    "search": search_command,
    "compare": compare_command,
    "finetune": finetune_command,
    "export": export_command,
    "verify": verify_command,
    "eval": eval_command,
    "generate": generate_command,
    "chat": chat_command,
    "tune": tune_command,
    "bench": bench_command,
    "bench-layer": bench_layer_command,
    "report": report_command,
    "init": init_command,
    "run": run_recipe_command,
    "ls": list_command,
    "schema": schema_command,
}

# Commands that load no model.
LIGHT = ("report", "ls", "schema")

FIRST_STEPS = (
    "First steps: `moeify run quickstart`, then `moeify inspect MODEL`. Each command takes --help. "
    "Work that is kept lies in $MOEIFY_CACHE, else in $XDG_CACHE_HOME/moeify, else in ~/.cache/moeify."
)

app = typer.Typer(
    name="moeify",
    help="Turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads.",
    cls=Group,
    epilog=FIRST_STEPS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point: runs the command and turns every outcome into an exit code."""
    interrupts: list[object] = []

    def interrupt(*signal_and_frame: object) -> NoReturn:
        interrupts.append(signal_and_frame)
        raise KeyboardInterrupt

    # A parent that has the signal ignored, as shells do for background jobs, keeps it so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a letter of a name gets its code, as Python does it on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run_command(sys.argv[1:], interrupted=lambda: bool(interrupts)))


def run_command(arguments: list[str], *, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Run one command line and return its exit code: 0, 1 bug, 2 usage, 3 input, 4 check failed, 130 interrupted.

    Args:
        arguments: what stands behind the program's name.
        interrupted: whether Ctrl-C was pressed. Compiled code that is interrupted may replace KeyboardInterrupt by an
            error of its own.
    """
    try:
        with warnings.catch_warnings():
            _show_warnings()
            _check_words(arguments)
            code = app(args=arguments, prog_name="moeify", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort, InterruptionError) as error:
        return _interrupted(error, arguments)
    except typer.Exit as error:
        return int(error.exit_code)
    except Exception as error:
        return _interrupted(error, arguments) if interrupted() else _report(error, debug="--debug" in arguments)
    return code if isinstance(code, int) else 0


def _check_words(arguments: list[str]) -> None:
    """Raise UsageError if a word can be no name, path or value, whatever the command.

    `Path("")` is the folder that one is in, so an empty variable of a script would name that.
    """
    for before, word in zip(["moeify", *arguments], arguments, strict=False):
        if not word or re.fullmatch(r"--?[\w-]+=", word):
            raise UsageError(f"{word or before} is empty", "leave it out, or name something")
        if "\0" in word or not _is_utf8(word):
            raise UsageError(f"{word!r:.100} holds NUL or is not UTF-8", "names and values are UTF-8")


def _is_utf8(word: str) -> bool:
    """Python has half letters for bytes of a command line that are no UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _show_warnings() -> None:
    """Have moeify's own warnings shown like its errors, each once; others as Python words them."""
    shown = set[str]()

    def show(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        from moeify.cli.render import Renderer

        if not issubclass(category, MoeifyWarning):
            Renderer().lines(warnings.formatwarning(message, category, filename, lineno))
        elif str(message) not in shown:
            shown.add(str(message))
            Renderer().warning(message)

    warnings.simplefilter("always", MoeifyWarning)
    warnings.showwarning = show  # type: ignore[assignment]


def _interrupted(error: BaseException, arguments: list[str]) -> int:
    """Say what an interrupted command leaves, and how it goes on."""
    from moeify.cli.render import Renderer

    kept = [note for one in (error, error.__cause__) for note in getattr(one, "__notes__", ())]
    renderer = Renderer()
    for line in ("interrupted", *dict.fromkeys(kept)):
        renderer.note(line)
    if kept:
        renderer.note(f"to go on: {quoted(['moeify', *arguments])}")
    return 130


def _report(error: Exception, *, debug: bool) -> int:
    """Show an error and return its exit code."""
    from moeify.cli.render import Renderer, traceback_of
    from moeify.resources import resource_error

    if hasattr(error, "show") and hasattr(error, "exit_code"):
        if type(error).__name__ == "NoArgsIsHelpError":
            Renderer().lines(str(error))
        else:
            Renderer().error(UsageError(*usage_error(error)))
        return 2
    if debug:
        traceback_of(error)
    # Disks and memory may fail at any line.
    error = resource_error(error) or error
    if isinstance(error, MoeifyError):
        Renderer().error(error)
        return error.exit_code
    Renderer().error(RuntimeError(f"{type(error).__name__}: {error} (a bug in moeify; --debug shows where)"))
    return 1


@app.callback()
def root(
    version: option.Version = False,
) -> None:
    """Turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads."""


class InterruptionError(Exception):
    """Stands for the KeyboardInterrupt that caused it, of which the option parser would leave the exit code alone."""


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose KeyboardInterrupt reaches `run_command` with its notes."""

    @wraps(command)
    def call(**values: Any) -> None:
        try:
            command(**values)
        except KeyboardInterrupt as error:
            raise InterruptionError from error

    return call


def _with_room(command: Callable[..., None]) -> Callable[..., None]:
    """The command, once it is known that the libraries fit into the address space that it may use."""

    @wraps(command)
    def call(**values: Any) -> None:
        from moeify.resources import check_address_space

        check_address_space()
        command(**values)

    return call


for _name, _command in COMMANDS.items():
    _run = option.expanded(_interruptible(_command if _name in LIGHT else _with_room(_command)))
    _words = Description.of(_command)
    app.command(_name, cls=Command, help=_words.text, short_help=_words.line, epilog=_words.example)(_run)


if __name__ == "__main__":
    main()
