"""How results look at Python's prompt and in a notebook: their fields in words, and rows as a table.

A result of thousands of numbers takes less than twenty lines at the prompt; a notebook shows all rows.
"""

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any, TypeVar

from moeify.command_line import Options
from moeify.results import properties_of
from moeify.words import number, on_one_line, size

Item = TypeVar("Item")
# At the prompt.
LINES, COLUMNS, INDENT = 19, 80, "    "
# In a notebook.
ROWS = 200
# Names are not taken apart.
WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
# Of a text that is no path, and of a list.
LETTERS = 140


class Readable:
    """Base of results; their dataclasses have `repr=False`."""

    def __repr__(self) -> str:
        simple, tables = _parts(self)
        width = max((len(name) for name, _ in simple), default=0)
        lines = [type(self).__name__]
        for name, words in simple:
            lines += wrap(f"  {name:{width}}  {words}", COLUMNS, subsequent_indent=" " * (width + 4), **WHOLE)
        for index, (name, rows) in enumerate(tables):
            lines += [f"  {name}: {len(rows)}", *_text_table(rows, LINES - len(lines) - len(tables) + index)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        simple, tables = _parts(self)
        parts = [f"<b>{type(self).__name__}</b>", _html_table([], simple)]
        for name, rows in tables:
            summary = f"<summary>{html.escape(name)}: {len(rows)}</summary>"
            parts.append(f"<details open>{summary}{_rows_html(rows)}</details>")
        return "".join(parts)


class Rows(list[Item]):
    """A list of results that reads as a table."""

    def __repr__(self) -> str:
        return "\n".join(_text_table(self, LINES)) if self else "[]"

    def _repr_html_(self) -> str:
        return _rows_html(self)


def _parts(result: Any) -> tuple[list[tuple[str, str]], list[tuple[str, Sequence[Any]]]]:
    """Fields in words, and those that are rows; fields that hold nothing are left out."""
    names = [field.name for field in dataclasses.fields(result)]
    values = {name: getattr(result, name) for name in (*properties_of(type(result)), *names)}
    tables = [(name, value) for name, value in values.items() if _is_rows(value)]
    simple = [
        (name, in_words(name, value))
        for name, value in values.items()
        if not _is_rows(value) and value is not None and not (isinstance(value, (Sequence, Mapping)) and not value)
    ]
    return simple, tables


def in_words(name: str, value: Any) -> str:
    """A value in one line.

    Args:
        name: of its field, which says the unit.
        value: anything.
    """
    if value is None or isinstance(value, bool):
        words = {None: "-", True: "yes", False: "no"}[value]
    elif isinstance(value, int):
        words = size(value) if name.endswith("_bytes") else f"{value:,}"
    elif isinstance(value, float):
        words = number(value)
    elif isinstance(value, str):
        text = on_one_line(value)
        words = text if len(text) <= LETTERS else f"{text[: LETTERS - 3]}..."
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        words = f"{str(value.dtype).removeprefix('torch.')} of {' x '.join(map(str, value.shape))}"
    else:
        words = _of_several(value)
    return words


def _of_several(value: Any) -> str:
    """A value that has parts, in one line."""
    if isinstance(value, Options):
        default = type(value)()
        return (
            _named({name: item for name, item in vars(value).items() if item != getattr(default, name)}) or "defaults"
        )
    if dataclasses.is_dataclass(value):
        parts = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return _named({field.name: part for field, part in parts if part != field.default})
    if isinstance(value, Mapping):
        return _named(value)
    if _is_rows(value):
        return f"{len(value)} x {type(value[0]).__name__}"
    if isinstance(value, (list, tuple)):
        return _joined([in_words("", item) for item in value])
    return on_one_line(value)


def _named(values: Mapping[Any, Any]) -> str:
    named = {str(name): value for name, value in values.items() if value is not None and value not in ("", (), [], {})}
    return _joined([f"{on_one_line(name)} {in_words(name, value)}" for name, value in named.items()])


def _joined(parts: Sequence[str]) -> str:
    """Whole parts, as many as there is room for; a number is never cut."""
    for count in range(len(parts), 0, -1):
        text = ", ".join(parts[:count])
        if len(text) <= LETTERS or count == 1:
            return text if count == len(parts) else f"{text} and {len(parts) - count} more"
    return ""


def _is_rows(value: Any) -> bool:
    """Results or parts of one, all of a kind."""
    return isinstance(value, (list, tuple)) and bool(value) and dataclasses.is_dataclass(value[0])


def _cells(rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Column names, and the cells of each row; columns that hold nothing are left out."""
    names = [field.name for field in dataclasses.fields(rows[0])]
    columns = {name: [in_words(name, getattr(row, name, None)) for row in rows] for name in names}
    filled = {name: cells for name, cells in columns.items() if any(cell not in ("-", "") for cell in cells)}
    return list(filled), [list(cells) for cells in zip(*filled.values(), strict=True)]


def _text_table(rows: Sequence[Any], num_lines: int) -> Iterator[str]:
    """A table that fits: whole rows from the first one on, and the columns for which there is room, or nothing."""
    # The header, and a line that says what is left out.
    shown = min(len(rows), num_lines - 2)
    if shown < 1:
        return
    names, cells = _cells(rows[:shown])
    columns, room = [], COLUMNS - len(INDENT)
    for column in zip(names, *cells, strict=True):
        width = max(map(len, column)) + 2
        if width <= room:
            room -= width
            columns.append([f"{cell:{width}}" for cell in column])
    yield from (INDENT + "".join(line).rstrip() for line in zip(*columns, strict=True))
    left = {"row": len(rows) - shown, "column": len(names) - len(columns)}
    more = [f"{count} more {what}{'s' if count > 1 else ''}" for what, count in left.items() if count]
    if more:
        yield f"{INDENT}without {' and '.join(more)}"


def _rows_html(rows: Sequence[Any]) -> str:
    if not rows:
        return "<i>none</i>"
    names, cells = _cells(rows[:ROWS])
    more = f"<p>and {len(rows) - ROWS} more</p>" if len(rows) > ROWS else ""
    return _html_table(names, cells) + more


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if header else ''}<tbody>{body}</tbody></table>"
