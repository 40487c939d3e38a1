"""Errors a user can cause. Each says what was found and what was expected, and carries a hint that works.

The command line turns them into `error: ...` / `hint: ...` on stderr and the class's exit code. Everything else that is
raised is a bug of moeify's own: one line and exit code 1, with the traceback under --debug.
"""

from typing import ClassVar


class MoeifyError(Exception):
    """Base of all errors that have a user-facing message.

    Args:
        message: what was found and what was expected, with the numbers.
        hint: what to do about it; printed on its own line.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(MoeifyError):
    """The command was called with options that contradict each other or do not exist."""

    exit_code = 2


class InputError(MoeifyError):
    """This model, text or folder cannot be used as it is."""

    exit_code = 3


class CheckError(MoeifyError):
    """A verification or a limit did not hold."""

    exit_code = 4
