"""The GitHub Actions example: its own commands, run here on the embedded model, pass and, made worse, fail."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeify.cli.app import run_command
from moeify.models.builtin import BuiltinRecipe, builtin_model

WORKFLOW = Path(__file__).parents[2] / ".github" / "workflows" / "regression.yml"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, smaller."""
    recipe = BuiltinRecipe(
        vocab_size=384, hidden_size=32, intermediate_size=128, num_layers=2, context=128, steps=40, warmup_steps=10
    )
    return builtin_model(tmp_path_factory.mktemp("dense"), recipe=recipe)


def commands() -> list[list[str]]:
    """Every moeify command of the workflow, in order, without the environment it is run from."""
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["regression"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    words = [shlex.split(line) for line in lines]
    return [line[1:] for line in words if Path(line[0]).name == "moeify"]


def test_the_gate_passes_and_notices_what_got_worse(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = WORKFLOW.parent.parent.parent / "recipes" / "ci-smoke.yaml"
    monkeypatch.chdir(tmp_path)
    small = ["--set", f"model={dense}", "--set", "split.tokens=2048", "--set", "eval.tokens=1024"]
    # So small a model may miss the recipe's own limits, which test_readme.py runs on the right one.
    small += ["--set", "limits={}", "--set", "controls={}"]
    extra = {"run": small, "bench": ["--tokens", "512", "--seconds-per-row", "0.05", "--skip", "memory"], "report": []}
    asked = commands()
    assert [words[0] for words in asked] == ["run", "bench", "run", "bench", "report"]
    for words in asked:
        there = [str(dense) if word == "builtin" else word for word in words]
        there = [str(recipe) if word.endswith("ci-smoke.yaml") else word for word in there]
        # Times of a machine that does other work besides say nothing here: only sizes and quality are compared.
        skipped = ["--skip", "speed"] if words[0] == "bench" else []
        assert run_command([*there, *extra[words[0]], *skipped]) == 0, words
    assert (tmp_path / "runs" / "head" / "report.html").is_file()
    capsys.readouterr()
    better = Path("runs/base/bench.json")
    found: dict[str, Any] = json.loads(better.read_text())
    for row in found["quality"]:
        for name in ("ratio", "ratio_low", "ratio_high"):
            row[name] *= 0.5
    better.write_text(json.dumps(found))
    regression = [str(dense) if word == "builtin" else word for word in asked[3]]
    assert run_command([*regression, *extra["bench"], "--skip", "speed", "--overwrite"]) == 4
    assert "perplexity" in capsys.readouterr().err
