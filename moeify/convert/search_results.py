"""The result of a search on disk: JSON and, beside it, its drawing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeify.convert.search import SearchResult
from moeify.errors import InputError, UsageError

SCHEMA = "moeify.search/1"


def check_drawable(file: Path) -> None:
    """Raise UsageError, before a long search, if `write_frontier` could not write to this file."""
    if file.suffix != ".json":
        raise UsageError(f"{file} does not end in .json", "the drawing is put beside it as .svg")


def write_frontier(result: SearchResult, file: Path, drawing: str) -> None:
    """Write FILE.json and, beside it, the drawing as FILE.svg."""
    check_drawable(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {"schema": SCHEMA, **asdict(result), "options": result.options}
    file.write_text(json.dumps(values, indent=1) + "\n")
    file.with_suffix(".svg").write_text(drawing, encoding="utf-8")


def searched_rows(files: Sequence[Path]) -> Mapping[str, Mapping[str, Any]]:
    """Name -> split options, from files that `write_frontier` wrote.

    Raises:
        InputError: no such file, or not a search result.
    """
    rows = {}
    for file in files:
        try:
            values = json.loads(file.read_text())
            options = dict(values["options"])
            name = f"moeify, {options['experts']} experts, searched ({file.stem})"
            rows[name] = {**options, "dense_layers": tuple(options["dense_layers"])}
            schema = values["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is not the result of a search: {error}", "moeify search -o FILE.json") from error
        if schema != SCHEMA:
            raise InputError(f"{file} has schema {schema!r}, expected {SCHEMA!r}", "moeify search -o FILE.json")
    return rows
