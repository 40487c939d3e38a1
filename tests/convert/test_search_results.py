"""A search on disk: the same every time, read back as it was, refused before the work if it could not be written."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moeify.cli.app import run_command
from moeify.convert import search_results as frontier
from moeify.convert.search import Point, SearchResult
from moeify.convert.search_results import SCHEMA, check_drawable, searched_rows, write_frontier
from moeify.errors import InputError, UsageError
from moeify.options import SplitOptions
from moeify.plan import Layout


def point(strategy: str, active: int, dense_layers: tuple[int, ...], perplexity: float) -> Point:
    layout = Layout(8, 1, active, dense_layers)
    share = layout.model_share(4)
    return Point(strategy, share, int(1e6 * share), layout, 0.1, 0.2, perplexity)


@pytest.fixture
def result() -> SearchResult:
    return SearchResult(
        model="some/model",
        budget=0.7,
        choice=point("beam", 5, (0,), 31.0),
        uniform=point("uniform", 5, (), 34.0),
        frontier=(point("greedy", 7, (), 30.0), point("greedy", 5, (0,), 32.0), point("greedy", 4, (), 40.0)),
        dense_perplexity=28.5,
        losses={"5/8": [0.1, 0.2, 0.3, 0.4]},
    )


def test_the_file_says_what_was_found(result: SearchResult, tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.json"
    write_frontier(result, file)
    assert sorted(path.name for path in file.parent.iterdir()) == ["found.json", "found.svg"]
    found = json.loads(file.read_text())
    assert found["schema"] == SCHEMA == "moeify.search/1"
    assert found["options"] == {"experts": 8, "shared": 1, "active": 5, "dense_layers": [0]}
    assert found == json.loads(json.dumps({"schema": SCHEMA, **asdict(result), "options": result.options}))


def test_rows_are_read_back_as_options_of_a_split(result: SearchResult, tmp_path: Path) -> None:
    other = replace(result, budget=0.5, choice=point("greedy", 4, (), 40.0))
    write_frontier(result, tmp_path / "a.json")
    write_frontier(other, tmp_path / "b.json")
    rows = searched_rows([tmp_path / "a.json", tmp_path / "b.json"])
    assert list(rows) == ["moeify, 8 experts, searched (a)", "moeify, 8 experts, searched (b)"]
    assert list(rows.values()) == [result.options, other.options]
    assert SplitOptions(**rows["moeify, 8 experts, searched (a)"]).dense_layers == (0,)
    assert searched_rows([]) == {}


def test_the_drawing_is_xml_with_all_series(result: SearchResult, tmp_path: Path) -> None:
    write_frontier(result, tmp_path / "a.json")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag.endswith("svg")
    text = (tmp_path / "a.svg").read_text()
    # Glyphs are outlines; the texts themselves stand in comments.
    for label in ("dense", "greedy", "every layer alike, 70%", "beam", "active parameters (million)"):
        assert f"<!-- {label} -->" in text, label
    write_frontier(replace(result, choice=point("greedy", 5, (0,), 32.0)), tmp_path / "b.json")
    assert "<!-- beam -->" not in (tmp_path / "b.svg").read_text()


def test_the_same_result_gives_the_same_files(result: SearchResult, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_frontier(result, tmp_path / f"{name}.json")
    for suffix in ("json", "svg"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["found", "found.svg", "found.JSON", "found.json.gz"])
def test_a_wrong_suffix(result: SearchResult, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.json"):
        check_drawable(tmp_path / name)
    with pytest.raises(UsageError, match=r"does not end in \.json"):
        write_frontier(result, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the search began")

    monkeypatch.setattr(importlib.import_module("moeify.convert.search"), "search", fail)


def test_a_wrong_suffix_is_found_before_the_search(
    tmp_path: Path, no_search: None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["search", "some/model", "-o", str(tmp_path / "found.txt")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "does not end in .json" in err


def test_without_matplotlib_a_drawing_is_refused_before_the_search(
    tmp_path: Path, no_search: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frontier, "find_spec", lambda _: None)
    assert run_command(["search", "some/model", "-o", str(tmp_path / "found.json")]) == 2
    assert 'pip install "moeify[search]"' in capfd.readouterr().err
    # Without a drawing nothing needs it.
    assert run_command(["search", "some/model"]) == 1
    assert "the search began" in capfd.readouterr().err


def absent(file: Path) -> None:
    pass


BROKEN: dict[str, Callable[[Path], Any]] = {
    "absent": absent,
    "folder": Path.mkdir,
    "empty": Path.touch,
    "half": lambda file: file.write_text('{"schema": "moeify.sea'),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00\x81"),
    "list": lambda file: file.write_text("[1, 2]"),
    "number": lambda file: file.write_text("3"),
    "something else": lambda file: file.write_text('{"schema": "moeify.search/1"}'),
    "options of no split": lambda file: file.write_text('{"schema": "moeify.search/1", "budget": 1, "options": 7}'),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "found.json"
    BROKEN[kind](file)
    with pytest.raises(InputError, match="is not the result of a search") as caught:
        searched_rows([file])
    assert caught.value.hint == "moeify search -o FILE.json"


def test_a_file_of_another_schema(result: SearchResult, tmp_path: Path) -> None:
    write_frontier(result, tmp_path / "found.json")
    text = (tmp_path / "found.json").read_text()
    (tmp_path / "found.json").write_text(text.replace("moeify.search/1", "moeify.search/2"))
    with pytest.raises(InputError, match=r"moeify\.search/2.*expected.*moeify\.search/1"):
        searched_rows([tmp_path / "found.json"])


def test_a_broken_file_is_found_before_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the comparison began")

    monkeypatch.setattr(importlib.import_module("moeify.check.compare"), "compare", fail)
    assert run_command(["compare", "some/model", "--searched", str(tmp_path / "nothing.json")]) == 3
    assert "is not the result of a search" in capfd.readouterr().err
