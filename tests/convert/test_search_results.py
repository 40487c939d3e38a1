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
from moeify.convert.search import Point, SearchResult
from moeify.convert.search_results import check_drawable, searched_rows, write_frontier
from moeify.errors import InputError, UsageError
from moeify.layout import Layout
from moeify.options import SplitOptions
from moeify.results import read

DRAWING = "<svg/>"


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
    write_frontier(result, file, DRAWING)
    assert sorted(path.name for path in file.parent.iterdir()) == ["found.json", "found.svg"]
    assert file.with_suffix(".svg").read_text() == DRAWING
    found = json.loads(file.read_text())
    assert found["schema"] == "moeify.search/1"
    layers = {"active_by_layer": [], "static_layers": [], "dense_layers": [0], "drop_layers": []}
    assert found["options"] == {"experts": 8, "shared": 1, "active": 5, **layers}
    assert found == json.loads(json.dumps({**found, **asdict(result)}))
    assert read(file, SearchResult) == result


def test_rows_are_read_back_as_options_of_a_split(result: SearchResult, tmp_path: Path) -> None:
    other = replace(result, budget=0.5, choice=point("greedy", 4, (), 40.0))
    write_frontier(result, tmp_path / "a.json", DRAWING)
    write_frontier(other, tmp_path / "b.json", DRAWING)
    rows = searched_rows([tmp_path / "a.json", tmp_path / "b.json"])
    assert list(rows) == ["moeify 8 experts searched (a)", "moeify 8 experts searched (b)"]
    assert list(rows.values()) == [result.options, other.options]
    assert SplitOptions(**rows["moeify 8 experts searched (a)"]).dense_layers == (0,)
    assert searched_rows([]) == {}


def test_the_same_result_gives_the_same_files(result: SearchResult, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_frontier(result, tmp_path / f"{name}.json", DRAWING)
    for suffix in ("json", "svg"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["found", "found.svg", "found.JSON", "found.json.gz"])
def test_a_wrong_suffix(result: SearchResult, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.json"):
        check_drawable(tmp_path / name)
    with pytest.raises(UsageError, match=r"does not end in \.json"):
        write_frontier(result, tmp_path / name, DRAWING)
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


def test_the_command_writes_both_files(
    result: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("moeify.convert.search"), "search", lambda *_, **__: result)
    assert run_command(["search", "some/model", "-o", str(tmp_path / "a.json")]) == 0
    assert "moeify split some/model --experts 8 --shared 1 --active 5" in capfd.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "some/model"
    drawing = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert "chosen: beam" in {text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")}


def absent(file: Path) -> None:
    pass


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (absent, "cannot read"),
    "folder": (Path.mkdir, "cannot read"),
    "empty": (Path.touch, "is not JSON"),
    "half": (lambda file: file.write_text('{"schema": "moeify.sea'), "is not JSON"),
    "list": (lambda file: file.write_text("[1, 2]"), "has schema None"),
    "something else": (lambda file: file.write_text('{"schema": "moeify.search/1"}'), "model: Field required"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "found.json"
    damage, message = BROKEN[kind]
    damage(file)
    with pytest.raises(InputError, match=message) as caught:
        searched_rows([file])
    assert caught.value.hint == "moeify search -o FILE.json"


def test_a_file_of_another_schema(result: SearchResult, tmp_path: Path) -> None:
    write_frontier(result, tmp_path / "found.json", DRAWING)
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
    assert "cannot read" in capfd.readouterr().err
