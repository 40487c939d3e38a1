"""One table of a benchmark, not yet drawn: for the terminal, for Markdown, for plain text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Cells of one table.

    Args:
        title: above it.
        columns: their names; those in `words` are text, the others are numbers.
        lines: of cells.
        words: see above.
        num_keys: of columns that name a row, the first ones.
        explained: columns whose meaning is told below it, of words.DEFINITIONS.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ("case",)
    num_keys: int = 1
    explained: tuple[str, ...] = ()
