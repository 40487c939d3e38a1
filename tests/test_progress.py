"""Time left is counted from this run's items alone, and only somebody who looks sees a bar."""

import contextlib
import io
import itertools
import re
import sys
import time
import types

import pytest

from moeify import progress
from moeify.progress import Clock, Resumed, said, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a test sets it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_known_after_one_item_however_long_it_takes(seconds: list[float]) -> None:
    clock = Clock(range(4), 4)
    assert clock.seconds_left() is None
    seconds[0] += 400
    clock.tick()
    assert clock.seconds_left() == 1200
    seconds[0] += 100
    assert clock.seconds_left() == 1100
    seconds[0] += 100
    clock.tick()
    assert clock.seconds_left() == 600


def test_what_an_earlier_run_finished_says_nothing_of_the_time_left(seconds: list[float]) -> None:
    clock = Clock(Resumed(range(10), 6), 10)
    assert clock.done == 6
    for _ in range(6):
        seconds[0] += 1
        clock.tick()
    assert (clock.done, clock.seconds_left()) == (6, None)
    seconds[0] += 50
    clock.tick()
    assert (clock.done, clock.seconds_left()) == (7, 150)


def test_a_loop_that_was_finished_before(seconds: list[float]) -> None:
    clock = Clock(Resumed(range(3), 5), 3)
    for _ in range(3):
        clock.tick()
    assert (clock.done, clock.seconds_left()) == (3, None)


def test_in_a_script_nothing_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(shown(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    said("a line")
    assert capfd.readouterr() == ("", "")


def test_in_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with contextlib.redirect_stderr(Terminal()) as err:
        for _ in shown(Resumed(range(3), 1), "layers\x07", 3):
            time.sleep(0.15)
        said("don\x07e")
    text = err.getvalue()
    assert "layers\\x07 (1 are there):  67%" in text
    assert "2/3" in text
    assert text.endswith("\rdon\\x07e\n")
    assert "\x07" not in text


def test_a_loop_that_ends_early_takes_its_bar_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with contextlib.redirect_stderr(Terminal()) as err:
        assert list(itertools.islice(shown(range(10), "layers", 10), 2)) == [0, 1]
    assert re.search(r"layers: .*\r *\r$", err.getvalue())


def test_a_notebook_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not progress.is_watched()
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert progress.is_watched()
