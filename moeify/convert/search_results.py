"""The result of a search on disk: JSON and, beside it, its drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeify.convert.search import SearchResult
from moeify.errors import UsageError
from moeify.results import read, write


def check_drawable(file: Path) -> None:
    """Raise UsageError, before a long search, if `write_frontier` could not write to this file."""
    if file.suffix != ".json":
        raise UsageError(f"{file} does not end in .json", "the drawing is put beside it as .svg")


def write_frontier(result: SearchResult, file: Path, drawing: str) -> None:
    """Write FILE.json and, beside it, the drawing as FILE.svg."""
    check_drawable(file)
    write(result, file)
    file.with_suffix(".svg").write_text(drawing, encoding="utf-8")


def searched_rows(files: Sequence[Path]) -> Mapping[str, Mapping[str, Any]]:
    """Name -> split options, from files that `write_frontier` wrote.

    Raises:
        InputError: no such file, or not a search result.
    """
    rows = {}
    for file in files:
        options = read(file, SearchResult, "moeify search -o FILE.json").options
        rows[f"moeify, {options['experts']} experts, searched ({file.stem})"] = options
    return rows
