"""Tables that fit the terminal: words wrap, numbers never do, and a table that is too wide is cut into bands.

A band repeats the columns that name a row and has as many of the others as fit. Where not even one fits, every row is a
block of its own, a line a column.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from moeify.words import printable

# Letters between two columns.
GAP = 2
# Longer words, which are paths, may break anywhere; a column of words takes no less than the shortest.
LONGEST_WORD, SHORTEST_WORDS = 24, 12


class DataTable(Table):
    """A table with a header.

    Args:
        title: above it.
        columns: their names.
        words: names of those that are text and may wrap; the others are numbers and do not.
        num_keys: so many of the first columns name a row.
        notes: sentences below it.
    """

    def __init__(
        self, title: str, columns: Sequence[str], *, words: Collection[str] = (), num_keys: int = 1, notes: str = ""
    ) -> None:
        super().__init__(title=title, caption=notes or None)
        self.num_keys = num_keys
        for name in columns:
            self.add_column(name, justify="left" if name in words else "right")


@dataclass(frozen=True)
class _Column:
    """One column of any table.

    Args:
        header, cells: what stands in it.
        is_number: it does not wrap.
        least, most: letters that it takes at least, and without a line break.
    """

    header: Text
    cells: Sequence[Text]
    is_number: bool
    least: int
    most: int

    @classmethod
    def of(cls, header: Text, cells: Sequence[Text], *, is_number: bool) -> "_Column":
        natural = max((cell_len(line) for cell in cells for line in cell.plain.splitlines()), default=0)
        longest = max((cell_len(word) for cell in cells for word in cell.plain.split()), default=0)
        title = max(map(cell_len, header.plain.split()), default=0)
        most = max(natural, cell_len(header.plain))
        least = natural if is_number else min(natural, max(min(longest, LONGEST_WORD), SHORTEST_WORDS))
        return cls(header, cells, is_number, max(least, title), most)


def fitted(table: Table, width: int) -> Iterator[Table]:
    """The same cells as one or several tables that are no wider, unless a single number or word is."""
    columns = [
        _Column.of(
            _text(column.header if table.show_header else ""),
            [_text(cell) for cell in column.cells],
            is_number=column.justify == "right" or column.no_wrap,
        )
        for column in table.columns
    ]
    num_keys = getattr(table, "num_keys", 1)
    keys, others = columns[:num_keys], columns[num_keys:]
    if not table.show_header or _least(columns) <= width or not others:
        yield _drawn(columns, width, header=table.show_header)
    elif all(_least([*keys, column]) <= width for column in others):
        for band in _even_bands(keys, others, width):
            yield _drawn([*keys, *band], width)
    else:
        for row in range(table.row_count):
            yield _drawn(list(_block(columns, row)), width, header=False)


def _block(columns: Sequence[_Column], row: int) -> Iterator[_Column]:
    """One row as two columns: the headers, and what stands below them."""
    whole = max((column.least for column in columns if column.is_number), default=0)
    for cells in ([column.header for column in columns], [column.cells[row] for column in columns]):
        column = _Column.of(Text(), cells, is_number=False)
        yield replace(column, least=max(min(column.least, SHORTEST_WORDS), min(whole, column.most)))


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))


def _least(columns: Sequence[_Column]) -> int:
    return sum(column.least for column in columns) + GAP * (len(columns) - 1)


def _even_bands(keys: Sequence[_Column], others: Sequence[_Column], width: int) -> list[list[_Column]]:
    """As few bands as fit, and of those the narrowest, so that none is left with a single column."""
    bands = list(_bands(keys, others, width))
    smallest = max(_least([*keys, column]) for column in others)
    narrower = (list(_bands(keys, others, limit)) for limit in range(smallest, width))
    return next((narrow for narrow in narrower if len(narrow) == len(bands)), bands)


def _bands(keys: Sequence[_Column], others: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    """The other columns in their order, as many at once as fit beside the keys."""
    band: list[_Column] = []
    for column in others:
        if band and _least([*keys, *band, column]) > width:
            yield band
            band = []
        band.append(column)
    yield band


def _drawn(columns: Sequence[_Column], width: int, *, header: bool = True) -> Table:
    """One table; room that is left goes to words that would wrap, then to headers, those first that lack least."""
    widths = [column.least for column in columns]
    spare = max(0, width - _least(columns))
    lacks = [(column.is_number, column.most - column.least) for column in columns]
    lacking = sorted(range(len(columns)), key=lambda index: lacks[index])
    for rank, index in enumerate(lacking):
        rivals = sum(lacks[other][0] == lacks[index][0] for other in lacking[rank:])
        more = min(lacks[index][1], spare // rivals)
        widths[index] += more
        spare -= more
    # The box of a header has one letter between columns.
    style, padding = (box.SIMPLE_HEAD, GAP - 1) if header else (None, GAP)
    table = Table(box=style, show_header=header, show_edge=False, pad_edge=False, padding=(0, padding, 0, 0))
    # Given, it may be wider than the terminal.
    table.width = sum(widths) + GAP * (len(widths) - 1)
    for column, letters in zip(columns, widths, strict=True):
        table.add_column(column.header, justify="right" if column.is_number else "left", width=letters, overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table
