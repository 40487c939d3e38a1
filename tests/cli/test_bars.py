"""Bars and lines of the command line: they fit into 80 columns, appear in time and say what a resumed loop found."""

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from moeify.cli import render
from moeify.cli.render import Renderer
from moeify.progress import Resumed

LABEL = "3 of 9, static-no-refit: evaluating a-model-of-some-length on builtin-heldout"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where a renderer of 80 columns draws its bars at once."""
    err = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(render, "PATIENCE_S", 0.0)
    monkeypatch.setattr(
        render, "PlainConsole", lambda **_: Console(file=err, force_terminal=True, width=80, color_system=None)
    )
    return err


def frames(drawn: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)) if line.strip()]


def test_a_bar_fits_and_says_how_long_it_will_take(terminal: io.StringIO) -> None:
    for _ in Renderer().track(range(12), LABEL, 12):
        time.sleep(0.03)
    lines = frames(terminal.getvalue())
    assert all(len(line) <= 80 for line in lines)
    assert any(
        line.startswith("3 of 9, static-no-refit") and re.search(r"\d+/12 0:00:00 about 0 s left", line)
        for line in lines
    )


def test_a_bar_is_there_while_the_first_item_is_not(terminal: io.StringIO) -> None:
    for _ in Renderer().track(range(1), "layers", 1):
        time.sleep(0.25)
    assert any("0/1" in line for line in frames(terminal.getvalue()))


def test_a_short_loop_shows_nothing(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "PATIENCE_S", 60.0)
    for _ in Renderer().track(range(3), "layers", 3):
        time.sleep(0.1)
    assert frames(terminal.getvalue()) == []


def test_a_resumed_loop_says_what_it_found(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "LOG_EVERY_S", 0.0)
    assert list(Renderer().track(Resumed(range(4), 3), "layers", 4)) == [0, 1, 2, 3]
    first, *others = capfd.readouterr().err.splitlines()
    assert first == "layers: 3 of 4 are there from an earlier run"
    # No time is said before an item of this run is done.
    assert others == ["layers: 3/4"] * 3 + ["layers: 4/4, about 0 s left"]
    found: list[Any] = list(Renderer(quiet=True).track(Resumed(range(4), 3), "layers", 4))
    assert found == [0, 1, 2, 3]
    assert capfd.readouterr() == ("", "")
