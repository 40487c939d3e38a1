"""llama.cpp's programs: where they are, and what one that does not end well says.

They are looked for in the folder that MOEIFY_LLAMA_CPP names, else on PATH. Each runs in a process of its own, which
ends with this one; a crash, a hang and an answer that is none become a `Failure`, whose words go into a row of the
result.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeify.benchmark.children import SIGNALLED, TIMED_OUT, run_program
from moeify.errors import InputError
from moeify.words import on_one_line

FOLDER = "MOEIFY_LLAMA_CPP"
BENCH, PERPLEXITY = "llama-bench", "llama-perplexity"
HINT = f"build llama.cpp, then put it on PATH or set {FOLDER} to the folder that holds {BENCH}"
# llama.cpp aborts there if a layer has more active experts than its graph of a fixed number of nodes holds; measured
# with 0.3.36 of llama-cpp-python.
NODES = "obj_new"
MOST_LETTERS = 240


class Failure(Exception):  # noqa: N818
    """A program that gave no result: why, in one line."""


def find(name: str) -> Path | None:
    """A program of llama.cpp; None if it is not there."""
    folder = os.environ.get(FOLDER)
    found = shutil.which(name, path=str(Path(folder).expanduser())) if folder else shutil.which(name)
    return Path(found).absolute() if found else None


def needed(name: str) -> Path:
    """A program without which there is nothing to measure.

    Raises:
        InputError: it is not there.
    """
    program = find(name)
    if program is None:
        folder = os.environ.get(FOLDER)
        raise InputError(f"{name} is not in {folder} ({FOLDER})" if folder else f"{name} is not on PATH", HINT)
    return program


def run(program: Path, *arguments: str, limit_seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Raises:
        Failure: it did not end well.
    """
    done = run_program(program, *arguments, limit_seconds=limit_seconds)
    if done.returncode:
        raise Failure(_reason(done, limit_seconds))
    return done


def objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects of an array that a program printed.

    Raises:
        Failure: it printed something else.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise Failure(f"it printed no JSON: {_short(text) or error}") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise Failure(f"it printed no list of results: {_short(text)}")
    return values


def _reason(done: subprocess.CompletedProcess[str], limit_seconds: float) -> str:
    line = _short(_telling([*done.stdout.splitlines(), *done.stderr.splitlines()]))
    if done.returncode == TIMED_OUT:
        return f"it was stopped after {limit_seconds:g} s (--limit-seconds)"
    if done.returncode == SIGNALLED + signal.SIGILL:
        return "it stopped at an instruction that this CPU does not have (SIGILL): build llama.cpp for this machine"
    how = f"it ended with {done.returncode}"
    if done.returncode > SIGNALLED and done.returncode - SIGNALLED in set(signal.Signals):
        how = f"it ended by {signal.Signals(done.returncode - SIGNALLED).name}"
    if NODES in line:
        how = f"too many active experts a layer for its graph; {how}"
    return f"{how}: {line}" if line else how


def _telling(lines: Sequence[str]) -> str:
    """The line that says most: a check that did not hold, the last error, the last line."""
    kept = [line for line in lines if line.strip()]
    for word in ("GGML_ASSERT", "error"):
        line = next((line for line in reversed(kept) if word in line), None)
        if line is not None:
            return line
    return kept[-1] if kept else ""


def _short(text: str) -> str:
    line = on_one_line(text.strip())
    return line if len(line) <= MOST_LETTERS else line[:MOST_LETTERS] + "..."
