"""A search on disk: JSON, and the frontier as a drawing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeify.convert.search import Point, SearchResult
from moeify.errors import InputError, UsageError

SCHEMA = "moeify.search/1"


def check_drawable(file: Path) -> None:
    """Raise UsageError, before a long search, if `write_frontier` could not write to this file."""
    if file.suffix != ".json":
        raise UsageError(f"{file} does not end in .json", "the drawing is put beside it as .svg")
    if find_spec("matplotlib") is None:
        raise UsageError("drawing a frontier needs matplotlib", 'pip install "moeify[search]"')


def write_frontier(result: SearchResult, file: Path) -> None:
    """Write FILE.json and, beside it, FILE.svg: active parameters against perplexity on the check text."""
    check_drawable(file)
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    values = {"schema": SCHEMA, **asdict(result), "options": result.options}
    file.write_text(json.dumps(values, indent=1) + "\n")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.axhline(result.dense_perplexity, color="gray", linestyle=":", label="dense")
    axes.plot(*_line(result.frontier), marker="o", label="greedy")
    axes.plot(*_line([result.uniform]), marker="s", linestyle="", label=f"every layer alike, {result.budget:.0%}")
    if result.choice.strategy != "greedy":
        axes.plot(*_line([result.choice]), marker="*", linestyle="", label=result.choice.strategy)
    axes.set_xlabel("active parameters (million)")
    axes.set_ylabel("perplexity on the check text")
    axes.set_title(f"{Path(result.model).name}: {result.choice.layout.num_experts} experts")
    axes.legend()
    # Names inside the drawing would otherwise be random.
    with mpl.rc_context({"svg.hashsalt": SCHEMA}):
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def _line(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.active_parameters / 1e6 for point in points], [point.perplexity for point in points]


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
