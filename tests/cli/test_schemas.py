"""The JSON Schemas of results. That results follow them is checked wherever a test prints one: see conftest.py."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from moeify.cli.app import run_command
from moeify.cli.schemas import PRINTED, json_schema
from moeify.errors import UsageError

COMMANDS = Path(__file__).parents[2] / "moeify" / "cli" / "commands"


@pytest.mark.parametrize("name", PRINTED)
def test_every_schema_is_one_and_describes_itself(name: str) -> None:
    found = json_schema(name)
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["$id"] == f"moeify.{name}/1"
    assert found["properties"]["schema"] == {"const": f"moeify.{name}/1"}
    whole = [found, *found.get("$defs", {}).values()]
    assert all(part.get("description") or part is found for part in whole if "properties" in part)
    assert "Tensor" not in json.dumps([part["properties"] for part in whole if "properties" in part])


def test_everything_that_is_printed_has_one() -> None:
    names = {
        name
        for file in COMMANDS.glob("*.py")
        for name in re.findall(r"renderer.result\(\s*\"([^\"]+)\"", file.read_text())
    }
    assert names == set(PRINTED)


@pytest.mark.parametrize(
    "change",
    [{"passed": 1}, {"more": 1}, {"schema": "moeify.verify/2"}, {"checks": [{"name": "keys"}]}, {"dense": None}],
)
def test_what_does_not_follow_is_refused(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "schema": "moeify.verify/1",
        "passed": True,
        "moe": "a",
        "dense": "b",
        "checks": [{"name": "keys", "passed": True, "found": "all", "expected": "all"}],
        "max_logit_difference": None,
        "max_gate_deviation": 0.0,
    }
    fields = set(json_schema("verify")["$defs"]["Check"]["properties"])
    good["checks"] = [{name: True if name == "passed" else "x" for name in fields}]
    jsonschema.validate(good, json_schema("verify"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good | change, json_schema("verify"))


def test_the_command_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["schema", "eval"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema("eval")
    assert run_command(["schema", "nothing"]) == 2
    with pytest.raises(UsageError, match="nothing"):
        json_schema("nothing")
