"""What a run says: bars that name its stage, and a line for every stage that is finished or was there already."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.errors import kept_when_interrupted
from moeify.options import Announce, Track
from moeify.words import duration


@dataclass(frozen=True)
class Lines:
    """The stages of a run, in their order.

    Args:
        names: of all of them.
        track: draws bars.
        announce: takes the lines.
    """

    names: Sequence[str]
    track: Track[Any]
    announce: Announce

    def begin(self, model: str, out: Path) -> None:
        self.announce(f"{model} to {out}, {len(self.names)} stages: {', '.join(self.names)}")

    def skip(self, name: str) -> None:
        self.announce(f"{self._place(name)}: is there already, skipped")

    @contextmanager
    def stage(self, name: str) -> Iterator[Track[Any]]:
        """A stage at work; yields what draws its bars."""
        place, began = self._place(name), time.monotonic()

        def track(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
            return self.track(items, f"{place}: {label}", total)

        finished = self.names[: self.names.index(name)]
        kept = f"{len(finished)} of {len(self.names)} stages, up to {finished[-1]}" if finished else ""
        with kept_when_interrupted(kept):
            yield track
        self.announce(f"{place}: finished in {duration(time.monotonic() - began)}")

    def _place(self, name: str) -> str:
        return f"{self.names.index(name) + 1} of {len(self.names)}, {name}"
