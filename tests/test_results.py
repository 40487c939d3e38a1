"""Results as JSON: written and read back as they were; damaged files named by file and field; schemas that hold.

That what a command prints follows its schema is checked wherever a test prints one: see conftest.py.
"""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moeify.check.compare import Comparison, Row
from moeify.check.contents import Check
from moeify.check.evaluate import Evaluation
from moeify.check.perplexity import EvalResult
from moeify.check.verify import VerifyReport
from moeify.cli.app import run_command
from moeify.convert.search import Point, SearchResult
from moeify.errors import InputError, UsageError
from moeify.layout import Layout
from moeify.recipes.limits import Limit
from moeify.recipes.run import RunResult
from moeify.results import (
    KINDS,
    check_writable,
    find_kind,
    json_schema,
    parse,
    read,
    schema_name,
    to_json,
    write,
    write_text,
)
from moeify.training.finetune import FinetuneHistory, FinetuneResult, StageHistory, StageResult

CHECK = Check("keys", "all", "all", passed=True)
POINT = Point("greedy", 0.5, 10, Layout(8, 1, 4, (0,)), 0.1, 0.2, 30.0)
EVAL = EvalResult("a", "text", 20.0, 100, 1.0, "abc")
RESULTS: Mapping[str, Any] = {
    "compare": Comparison("m", (Row("dense", 1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, {"t": 2.0}, {}),), {}, {"c": 512}),
    "search": SearchResult("m", 0.5, POINT, POINT, (POINT,), 28.0, {"4/8": [0.1, 0.2]}),
    "eval": Evaluation((EVAL,)),
    "finetune": FinetuneResult(Path("out"), "m", (StageResult("full", 9, {"kl": 1.0}, {"kl": 0.5}, None, 7),)),
    "finetune-history": FinetuneHistory((StageHistory("full", {"kl": 1.0}, {"kl": 0.5}, 9, ({"step": 1},)),)),
    "run": RunResult(Path("out"), ("moe",), None, (EVAL,), (Limit("verify", "1", "< 2", passed=True),)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_schema_is_one_and_describes_itself(name: str) -> None:
    assert schema_name(find_kind(name)) == name
    schema = json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"moeify.{name}/1"
    assert schema["properties"]["schema"] == {"const": f"moeify.{name}/1"}
    whole = [schema, *schema.get("$defs", {}).values()]
    assert all(part.get("description") or part is schema for part in whole if "properties" in part)
    assert "Tensor" not in json.dumps([part["properties"] for part in whole if "properties" in part])


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_read_as_it_was_written_and_follows_its_schema(name: str, tmp_path: Path) -> None:
    result, file = RESULTS[name], tmp_path / "new" / "result.json"
    write(result, file)
    assert read(file, type(result)) == result
    jsonschema.validate(json.loads(file.read_text()), json_schema(name))
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_properties_stand_beside_the_fields() -> None:
    assert to_json(RESULTS["search"])["options"] == {
        "experts": 8,
        "shared": 1,
        "active": 4,
        "active_by_layer": [],
        "static_layers": [],
        "dense_layers": [0],
        "drop_layers": [],
    }
    assert to_json(RESULTS["run"])["passed"] is True


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_float_that_is_not_finite_is_null_and_read_as_nan(value: float, tmp_path: Path) -> None:
    rows = (dataclasses.replace(EVAL, perplexity=value), EVAL, dataclasses.replace(EVAL, tokens_per_second=value))
    write(Evaluation(rows), tmp_path / "eval.json")
    values = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert values["results"][0]["perplexity"] is None
    jsonschema.validate(values, json_schema("eval"))
    again = read(tmp_path / "eval.json", Evaluation).results
    assert math.isnan(again[0].perplexity)
    assert again[1] == EVAL
    assert math.isnan(again[2].tokens_per_second)
    with pytest.raises(InputError, match=r"results\.0\.perplexity: .*number.*found None"):
        parse(values, Evaluation, tmp_path / "eval.json", finite=True)


SCHEMA = {"schema": "moeify.eval/1"}
DAMAGED: Mapping[str, tuple[Any, str]] = {
    "other schema": ({"schema": "moeify.eval/2"}, r"has schema moeify\.eval/2, expected moeify\.eval/1"),
    "no schema": ({"results": []}, r"has schema None, expected moeify\.eval/1"),
    "a list": ([1], "has schema None"),
    "a missing field": (SCHEMA | {"results": [{"model": "a"}]}, r"results\.0\.data: Field required"),
    "a wrong type": (SCHEMA | {"results": 3}, "results: Input should be a valid tuple, found 3"),
    "null for a word": (SCHEMA | {"results": [vars(EVAL) | {"model": None}]}, r"results\.0\.model: .*found None"),
}


@pytest.mark.parametrize(("values", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_with_its_field(values: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as caught:
        read(file, Evaluation, "do this")
    assert str(file) in str(caught.value)
    assert caught.value.hint == "do this"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read"), (b"\xff{", "is not JSON"), (b"{", "is not JSON")]
)
def test_a_file_that_is_no_json(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "eval.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "eval.json", Evaluation)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write(RESULTS["eval"], tmp_path / "file" / "eval.json")


def test_writing_needs_no_pydantic() -> None:
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "from moeify.plugin_list import listing; from moeify.results import to_json\n"
        "print(to_json(listing('targets'))['schema'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "moeify.ls/1\n", done.stderr


@pytest.mark.parametrize(
    "change",
    [{"passed": 1}, {"more": 1}, {"schema": "moeify.verify/2"}, {"checks": [{"name": "keys"}]}, {"dense": None}],
)
def test_what_does_not_follow_a_schema_is_refused(change: dict[str, Any]) -> None:
    good = json.loads(json.dumps(to_json(VerifyReport("a", "b", (CHECK,), None, 0.0))))
    jsonschema.validate(good, json_schema("verify"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good | change, json_schema("verify"))


def test_the_command_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["schema", "eval"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema("eval")
    assert run_command(["schema", "nothing"]) == 2
    with pytest.raises(UsageError, match="nothing"):
        json_schema("nothing")


OTHERS = {
    "another result": json.dumps({"schema": "moeify.search/1"}),
    "a list": "[1]",
    "no json": "years of work",
    "no text": "\0",
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_kind_is_never_replaced(tmp_path: Path, content: str) -> None:
    file = tmp_path / "eval.json"
    file.write_text(content)
    for call in (lambda: check_writable(file, Evaluation), lambda: write(RESULTS["eval"], file)):
        with pytest.raises(InputError, match=r"eval\.json is no eval result that moeify wrote") as caught:
            call()
        assert caught.value.hint
        assert file.read_text() == content


def test_a_file_of_the_kind_and_an_empty_one_are_replaced(tmp_path: Path) -> None:
    for content in ("", json.dumps({"schema": "moeify.eval/0"})):
        (tmp_path / "target.json").write_text(content)
        (tmp_path / "eval.json").unlink(missing_ok=True)
        (tmp_path / "eval.json").symlink_to("target.json")
        check_writable(tmp_path / "eval.json", Evaluation)
        assert (tmp_path / "target.json").read_text() == content
        write(RESULTS["eval"], tmp_path / "eval.json")
        # Through the link.
        assert read(tmp_path / "target.json", Evaluation) == RESULTS["eval"]
        assert (tmp_path / "eval.json").is_symlink()


def test_a_page_or_drawing_is_replaced_if_it_says_that_it_is_ours(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_text("<p>ours</p>", file, "ours")
    write_text("<p>ours, again</p>", file, "ours")
    with pytest.raises(InputError, match=r"page\.html is no html file that moeify wrote"):
        write_text("<p>", file, "another mark")
    assert file.read_text() == "<p>ours, again</p>"


@pytest.mark.parametrize("place", [".", "/dev/null", "/proc/result.json", "file/result.json"])
def test_a_bad_place_for_a_result_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(InputError, match=r"is not a file|cannot write") as caught:
        check_writable(Path(place), Evaluation)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
