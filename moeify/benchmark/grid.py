"""One table of a benchmark, not yet drawn: for the terminal, for Markdown, for plain text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Cells of one table; the columns named in `words` are text, the others are numbers; the first ones name a row."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ("case",)
    num_keys: int = 1
