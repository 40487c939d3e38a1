"""The result of a search on disk: JSON and, beside it, its drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeify.convert.search import SearchResult
from moeify.errors import UsageError
from moeify.results import check_writable, read, write, write_text

# Says that a drawing was written by moeify.
DRAWING = 'data-generator="moeify"'


def check_drawable(file: Path) -> None:
    """Refuse, before a long search, a file to which `write_frontier` could not write.

    Raises:
        UsageError: its name does not end in .json.
        InputError: it, or the drawing beside it, cannot be written or is not ours to replace.
    """
    if file.suffix != ".json":
        raise UsageError(f"{file} does not end in .json", "the drawing is put beside it as .svg")
    check_writable(file, SearchResult)
    check_writable(file.with_suffix(".svg"), DRAWING)


def write_frontier(result: SearchResult, file: Path, drawing: str) -> None:
    """Write FILE.json and, beside it, the drawing as FILE.svg."""
    check_drawable(file)
    write(result, file)
    write_text(drawing, file.with_suffix(".svg"), DRAWING)


def searched_rows(files: Sequence[Path]) -> Mapping[str, Mapping[str, Any]]:
    """Name -> split options, from files that `write_frontier` wrote.

    Raises:
        InputError: no such file, or not a search result.
    """
    rows = {}
    for file in files:
        options = read(file, SearchResult, "moeify search -o FILE.json").options
        rows[f"moeify {options['experts']} experts searched ({file.stem})"] = options
    return rows
