"""Names of controls become folders: one safe part of a path, none of a run's own, each another folder everywhere."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from moeify.errors import UsageError
from moeify.recipes.model import load_recipe
from moeify.recipes.names import ENDINGS, RESERVED, PathPart, check_different

PART: TypeAdapter[str] = TypeAdapter(PathPart)

GOOD = ["static", "static-no-refit", "a", "_x", "0", "75%", "seed=1", "k means", "größer", "a.b", "x" * 100, "moe2"]
UNSAFE = [
    *("", " ", ".", "..", "...", "/", "a/b", "/etc", "../x", "a/../b", "a\\b", "C:", "~", "*", "$HOME", "a;b", "'"),
    *(".hidden", "-x", "--help", " a", "a ", "a.", "a\nb", "a\n", "a\tb", "a\0b", "\x1b[2J", "a\x7f", "\ud800", "|"),
    *("a\u202eb", "a\u200bb", "a\u2028b", "x" * 101, "\uff0e\uff0e", "a\uff0fb", "<b>", "[red]"),
]
TAKEN = [
    *(RESERVED + tuple(name.upper() for name in RESERVED)),
    *(f"x{ending}" for ending in ENDINGS),
    *("recipe.yaml", "Run.JSON", "compare.json", "bench.json", "report.html", "moe-finetuned", "moe-FINETUNED"),
    *("moe.done", "moe.partial", "moe.replaced-0123", "\uff4d\uff4f\uff45", "BENCH", "ben\uff43h"),
]


@pytest.mark.parametrize("name", GOOD)
def test_a_name_that_is_one_safe_part(name: str) -> None:
    assert PART.validate_python(name) == name


@pytest.mark.parametrize("name", [*UNSAFE, *TAKEN], ids=ascii)
def test_a_name_that_is_not(name: str) -> None:
    with pytest.raises(ValidationError):
        PART.validate_python(name)


@pytest.mark.parametrize("names", [["a", "A"], ["straße", "STRASSE"], ["\u00e9", "e\u0301"], ["x", "y", "X"]])
def test_two_names_of_one_folder(names: list[str]) -> None:
    with pytest.raises(ValueError, match="one folder"):
        check_different(names)
    check_different([*names[:1], "b"])


@pytest.mark.parametrize("name", ["..", "moe", "a\x1b[2J"])
def test_an_error_names_field_value_and_what_is_allowed(tmp_path: Path, name: str) -> None:
    values: dict[str, Any] = {"version": 1, "model": "m", "out": str(tmp_path / "out"), "controls": {name: {}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "r.yaml")
    said = str(caught.value)
    assert "r.yaml: controls." in said
    assert "expected up to 100 letters, digits, spaces" in said
    assert said.endswith(f"found {name!r}")
