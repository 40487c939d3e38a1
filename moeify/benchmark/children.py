"""Processes that a benchmark starts: they end with the one that started them, however that ends.

    python -m moeify.benchmark.children module MODULE ARGUMENT...
    python -m moeify.benchmark.children program SECONDS PROGRAM ARGUMENT...

runs a module as `python -m MODULE` does, or any program for at most so many seconds, and ends it when its own standard
input ends: the other end of that pipe is held by the parent alone, and the system closes it with the parent, also after
SIGKILL. Imports nothing heavy.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import moeify

# What GNU `timeout` ends with, and what a shell makes of a signal's number.
TIMED_OUT = 124
SIGNALLED = 128


def child_environment(**values: str) -> dict[str, str]:
    """This process's variables, and the same moeify as this one, wherever it was imported from.

    Args:
        values: further variables.
    """
    home = str(Path(moeify.__file__).resolve().parent.parent)
    paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, **values}


def run_child(module: str, *arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a module in a process of its own and wait for it; what it prints is in the result.

    Args:
        module: name of a module that does its work when it is run.
        arguments: for it.
        environment: its variables, all of them.
    """
    return _run("module", module, *arguments, environment=environment)


def run_program(program: Path, *arguments: str, limit_seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program and wait for it; what it prints is in the result.

    Args:
        program: its file.
        arguments: for it.
        limit_seconds: it and what it started are killed if it takes longer, and the result's code is TIMED_OUT. A
            signal that ended it gives SIGNALLED plus the signal's number.
    """
    words = (f"{limit_seconds:g}", str(program), *arguments)
    return _run("program", *words, environment=child_environment())


def _run(*words: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-m", "moeify.benchmark.children", *words],
            stdin=reader,
            env=dict(environment),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)


def _end_with_parent(before: Callable[[], None]) -> None:
    while os.read(0, 1):
        pass
    before()
    os._exit(1)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It is the first of a session of its own, with all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def limited(seconds: float, *words: str) -> int:
    """Run a program; its exit code, see `run_program`."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(partial(_kill, process),), daemon=True).start()
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        code = TIMED_OUT
    finally:
        _kill(process)
        process.wait()
    return code if code >= 0 else SIGNALLED - code


def main(kind: str, *arguments: str) -> None:
    """Run the module, which a thread watches the parent for from before its first import; or the program."""
    if kind == "program":
        sys.exit(limited(float(arguments[0]), *arguments[1:]))
    threading.Thread(target=_end_with_parent, args=(lambda: None,), daemon=True).start()
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
