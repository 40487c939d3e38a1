"""One table of a benchmark, not yet drawn: for the terminal, for Markdown, for plain text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Cells of one table; the columns named in `words` are text, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ("case",)
