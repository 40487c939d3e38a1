"""Progress of long loops: what the Python API shows by itself, what a resumed loop says, and how time left is counted.

The command line draws its own bars, see cli/render.py. In a script whose errors go to a file the API shows nothing.
"""

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moeify.words import on_one_line

# A loop shows its bar once it has taken this long.
PATIENCE_S = 2.0


@dataclass(frozen=True)
class Resumed:
    """The items of a loop, of which an earlier run finished the first.

    Args:
        items: all of them, the finished ones first.
        num_finished: how many those are; they may still be read again, which is fast.
    """

    items: Iterable[Any]
    num_finished: int

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Clock:
    """Counts the items of a loop and the time that is left; what an earlier run finished tells nothing of that.

    Args:
        items: of the loop, maybe `Resumed`.
        total: how many they are.
    """

    def __init__(self, items: Iterable[Any], total: int) -> None:
        self.done = self.num_finished = min(total, items.num_finished if isinstance(items, Resumed) else 0)
        self._total, self._read = total, 0
        self._began = self._last = time.monotonic()

    def tick(self) -> None:
        """Count an item that has been dealt with."""
        self._last = time.monotonic()
        self._read += 1
        if self._read <= self.num_finished:
            self._began = self._last
        else:
            self.done += 1

    def seconds_left(self) -> float | None:
        """By the mean of all items of this run, however long one takes; None before the first is done."""
        fresh = self.done - self.num_finished
        if not fresh:
            return None
        each = (self._last - self._began) / fresh
        return max(0.0, each * (self._total - self.done) - (time.monotonic() - self._last))


def shown(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """Yield the items, with a bar in a terminal or notebook once they take more than PATIENCE_S."""
    if not is_watched():
        yield from items
        return
    clock = Clock(items, total)
    label = on_one_line(label) + (f" ({clock.num_finished} are there)" if clock.num_finished else "")
    # No smoothing: the mean of all items, also where one takes minutes.
    with _bar()(
        total=total, initial=clock.done, desc=label, delay=PATIENCE_S, smoothing=0, leave=False, dynamic_ncols=True
    ) as bar:
        for item in items:
            yield item
            clock.tick()
            if clock.done > bar.n:
                bar.update()
            else:
                # Its timer begins behind what an earlier run finished.
                bar.unpause()


def said(line: str) -> None:
    """A line about what is done, in a terminal or notebook."""
    if is_watched():
        _bar().write(on_one_line(line), file=sys.stderr)


def is_watched() -> bool:
    """Whether somebody sees the progress: stderr is a terminal, or this is a notebook's process."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())


def _bar() -> Any:
    with warnings.catch_warnings():
        # A notebook without ipywidgets gets bars of letters.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm
