"""What a search found, on disk: JSON, and the frontier as a drawing."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeify.convert.search import Point, SearchResult
from moeify.errors import UsageError
from moeify.results import read, write


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

    write(result, file)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.axhline(result.dense_perplexity, color="gray", linestyle=":", label="dense")
    axes.plot(*_line(result.frontier), marker="o", label="greedy")
    axes.plot(*_line([result.uniform]), marker="s", linestyle="", label=f"every layer alike, {result.budget:.0%}")
    if result.found.strategy != "greedy":
        axes.plot(*_line([result.found]), marker="*", linestyle="", label=result.found.strategy)
    axes.set_xlabel("active parameters (million)")
    axes.set_ylabel("perplexity on the check text")
    axes.set_title(f"{Path(result.model).name}: {result.found.layout.num_experts} experts")
    axes.legend()
    # Names inside the drawing would otherwise be random.
    with mpl.rc_context({"svg.hashsalt": "moeify.search/1"}):
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
        options = read(file, SearchResult, "moeify search -o FILE.json").options
        rows[f"moeify, {options['experts']} experts, searched ({file.stem})"] = options
    return rows
