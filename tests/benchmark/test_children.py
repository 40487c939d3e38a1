"""Processes that a benchmark starts give what they print, and die with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moeify
from moeify.benchmark.children import run_child

PARENT = """
import os
from moeify.benchmark.children import run_child
run_child("sleeper", "PID", environment=os.environ)
"""
# Busy in the way of the real one: in Python, and not looking at its input.
SLEEPER = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1] + ".tmp").write_text(str(os.getpid()))
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
while True: time.sleep(0.01)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a folder of modules of its own."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(moeify.__file__).parents[1])])}


def is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    # Dead and not waited for yet.
    status = Path(f"/proc/{number}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_child_gets_its_arguments_and_gives_what_it_prints(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "speaker.py").write_text("import sys; print(sys.argv, __name__); sys.exit(3)")
    done = run_child("speaker", "a b", "-c", environment=environment)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.endswith("'a b', '-c'] __main__\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_child_dies_with_its_parent(tmp_path: Path, environment: dict[str, str], number: signal.Signals) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    file = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("PID", str(file))], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not file.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(file.read_text())
    try:
        assert is_alive(child)
        parent.send_signal(number)
        parent.wait(timeout=30)
        while is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(child)
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)
