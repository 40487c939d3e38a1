"""Errors a user can cause, and warnings: what was found and what was expected; errors carry a hint that works.

The command line turns them into `error: ...` / `hint: ...` on stderr and the class's exit code. Everything else that is
raised is a bug of moeify's own: one line and exit code 1, with the traceback under --debug. Warnings become
`warning: ...` on stderr, each once; they do not stop the work.
"""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from moeify.words import printable


class MoeifyError(Exception):
    """Base of all errors that have a user-facing message.

    Args:
        message: what was found and what was expected, with the numbers.
        hint: what to do about it; printed on its own line.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(MoeifyError):
    """The command was called with options that contradict each other or do not exist."""

    exit_code = 2


class InputError(MoeifyError):
    """This model, text or folder cannot be used as it is."""

    exit_code = 3


class DiskError(InputError):
    """A file could not be written or read back; what is finished stays, and the same command goes on from it."""


class CheckError(MoeifyError):
    """A verification or a limit did not hold."""

    exit_code = 4


def unknown(what: str, name: str, known: Iterable[str], lead: str = "there are") -> UsageError:
    """The error for a name that nothing has: 'kmean' is not a partition; did you mean kmeans? there are ...

    Args:
        what: what it should name, with its article.
        known: the names that there are.
        lead: words before them in the hint.
    """
    names = list(known)
    similar = nearest(name, names)
    question = f"did you mean {similar}? " if similar else ""
    return UsageError(f"{name!r:.100} is not {what}", f"{question}{lead} {', '.join(names)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that somebody who typed this one probably meant; empty if none is like it."""
    lowered = {other.lower().replace("-", "_"): other for other in known}
    word = name.lower().replace("-", "_")
    # At 0.67 gpu would be cpu.
    similar = difflib.get_close_matches(word, lowered, n=1, cutoff=0.7)
    # A word that was cut short is like what it begins, whatever their lengths.
    similar = similar or [other for other in lowered if len(word) > 2 and other.startswith(word)]
    return lowered[similar[0]] if similar else ""


class MoeifyWarning(UserWarning):
    """Something about an input that a user should know and that does not stop the work."""


@contextmanager
def kept_when_interrupted(what: str) -> Iterator[None]:
    """Note on a KeyboardInterrupt what a run leaves to the next one; the command line says it, and so do tracebacks.

    On other errors than moeify's own too: compiled code that is interrupted may replace KeyboardInterrupt by its own.

    Args:
        what: is kept; nothing if it is empty.
    """
    try:
        yield
    except MoeifyError:
        raise
    except BaseException as error:
        if what:
            error.add_note(f"kept: {what}")
        raise


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind as well where the words alone say nothing."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    told = isinstance(error, ValueError | OSError | ImportError) and line
    return printable(line if told else f"{type(error).__name__}: {line}".rstrip(": "))


def warn(message: str) -> None:
    """Say what was found and what is done about it."""
    warnings.warn(message, MoeifyWarning, stacklevel=2)
