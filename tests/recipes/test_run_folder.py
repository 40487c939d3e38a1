"""A run replaces only what it made itself in its folder, and says so before it begins."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeDense

from moeify.cli.app import run_command
from moeify.errors import InputError
from moeify.recipes import markers
from moeify.recipes.model import Recipe, load_recipe
from moeify.recipes.preview import preview_run

# The package binds the name `run` to the function.
stages_module = importlib.import_module("moeify.recipes.run")
run = stages_module.run
BENCH = {"tokens": 128, "prompt": [8], "batch": [1], "seconds_per_row": 0.01, "skip": ["memory", "experts", "quality"]}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def made(make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done; copy it."""
    folder = tmp_path_factory.mktemp("made") / "runs"
    run(recipe_in(folder, str(make_dense("llama", intermediate_size=128)), str(calibration_file)))
    return folder


def recipe_in(out: Path, model: str, text: str, **sections: Any) -> Recipe:
    split = {"experts": 8, "tokens": 1024, "calibration": [text]}
    controls = {"static": {"static": True}}
    values = {"version": 1, "model": model, "out": str(out), "split": split, "controls": controls, "verify": False}
    file = out.with_name("r.yaml")
    file.write_text(yaml.safe_dump({**values, **sections}))
    return load_recipe(file)


@pytest.fixture
def make(make_dense: MakeDense, calibration_file: Path, made: Path, tmp_path: Path) -> Make:
    """make(**sections) -> a recipe whose folder holds the results of an earlier run."""
    shutil.copytree(made, tmp_path / "runs")
    model = str(make_dense("llama", intermediate_size=128))
    return lambda **sections: recipe_in(tmp_path / "runs", model, str(calibration_file), **sections)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(recipe: Recipe, pattern: str, *, overwrite: bool = False) -> InputError:
    """Before the first stage: nothing has changed then."""
    before = contents(recipe.out)
    for call in (run, preview_run):
        with pytest.raises(InputError, match=pattern) as caught:
            call(recipe, overwrite=overwrite)
    assert contents(recipe.out) == before
    return caught.value


OTHER = {"split": {"experts": 4, "tokens": 1024}}


def test_what_a_run_made_is_made_again_with_other_options(make: Make) -> None:
    assert run(make()).skipped == ("moe", "static")
    assert run(make(**OTHER)).skipped == ()


def test_a_result_without_a_marker_is_not_replaced(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = make()
    (recipe.out / "moe.done").unlink()
    assert "--overwrite" in refused(recipe, "runs/moe was not made by this run").hint
    assert run_command(["run", str(recipe.out.with_name("r.yaml"))]) == 3
    assert "runs/moe was not made by this run" in capfd.readouterr().err
    assert run_command(["run", str(recipe.out.with_name("r.yaml")), "--overwrite", "--quiet"]) == 0


def test_another_result_in_its_place_is_not_replaced(make: Make) -> None:
    recipe = make()
    record = recipe.out / "moe" / "moeify.json"
    record.write_text(record.read_text() + "\n")
    refused(recipe, "runs/moe was put into the place of what this run made")
    assert run(recipe, overwrite=True).skipped == ("static",)


def test_a_control_is_looked_at_before_the_main_split_begins(make: Make) -> None:
    recipe = make(**OTHER)
    (recipe.out / "static.done").unlink()
    refused(recipe, "runs/static was not made by this run")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_nobody_knows_keeps_its_folder(make: Make, overwrite: bool) -> None:
    recipe = make(**OTHER)
    (recipe.out / "moe" / "notes.txt").write_text("mine")
    refused(recipe, "notes.txt was not written by moeify", overwrite=overwrite)
    # It stays where nothing has to be replaced.
    assert run(make()).skipped == ("moe", "static")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "moe.done", "compare.json", "bench.json"])
def test_a_file_of_a_user_is_not_replaced(make: Make, name: str, overwrite: bool) -> None:
    recipe = make(compare={"budget": [0.5]}, bench=BENCH)
    (recipe.out / name).write_text(json.dumps({"schema": "moeify.eval/1"}))
    stage = not overwrite and name in ("compare.json", "bench.json")
    refused(recipe, f"{name} was not made by this run" if stage else f"{name} is no", overwrite=overwrite)


def test_an_unfinished_split_of_somebody_else_is_not_discarded(make: Make) -> None:
    recipe = make(controls={"other": {"seed": 1}})
    (recipe.out / "other.partial").mkdir()
    (recipe.out / "other.partial" / "job.json").write_text("{}")
    refused(recipe, "other.partial was not begun by this run")


def test_a_run_in_the_folder_of_its_own_recipe(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that somebody wrote is not replaced by the one that says what was done."""
    recipe = make()
    file = Path(shutil.move(recipe.out.with_name("r.yaml"), recipe.out / "recipe.yaml"))
    before = file.read_text()
    monkeypatch.chdir(recipe.out)
    assert run_command(["run", "recipe.yaml", "-o", ".", "--quiet"]) == 3
    assert file.read_text() == before


def test_every_stage_goes_on_that_was_killed_before_its_marker(
    make: Make, monkeypatch: pytest.MonkeyPatch, calibration_file: Path
) -> None:
    """Its result is complete, and nobody else's."""
    text, tokens = str(calibration_file), {"tokens": 512, "eval_tokens": 128}
    tuned = {"data": [text], "eval_data": [text], "stage": ["layers"], **tokens, "layer_tokens": 512}
    compared = {"budget": [0.5], "method": ["static"], "data": [text], "data_tokens": 128}
    # A budget and a context of its own: options that a split settles.
    split = {"experts": 8, "tokens": 1024, "calibration": [text], "context": 32, "budget": 0.5}
    recipe = make(split=split, finetune=tuned, compare=compared, bench={**BENCH, "data": [text]})
    killed: list[str] = []
    finish = markers.finish

    def kill(out: Path, stage: markers.Stage, inputs: str, seconds: float | None = None) -> None:
        if stage.name not in killed:
            killed.append(stage.name)
            raise KeyboardInterrupt
        finish(out, stage, inputs, seconds)

    monkeypatch.setattr(markers, "finish", kill)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    assert run(recipe).out == recipe.out
    assert killed == ["moe", "static", "moe-finetuned", "compare", "bench"]
    # How long both parts took together is not known, so it is not said.
    assert seconds_of(recipe, "moe") is None
    assert run(recipe).skipped == ("moe", "static", "moe-finetuned", "bench")


def seconds_of(recipe: Recipe, name: str) -> float | None:
    marker = markers.read_marker(recipe.out, name)
    assert marker is not None
    return marker.seconds


def test_a_marker_says_how_long_its_stage_took(make: Make) -> None:
    recipe = make()
    seconds = seconds_of(recipe, "moe")
    assert seconds is not None
    assert 0 < seconds < 600
    assert run(recipe).skipped == ("moe", "static")
    assert seconds_of(recipe, "moe") == seconds


def test_a_result_that_came_while_a_stage_was_unfinished_is_not_replaced(make: Make) -> None:
    """Killed in the middle, and then another split was put there by hand."""
    recipe = make()
    marker = recipe.out / "moe.done"
    values = {**json.loads(marker.read_text()), "result": "", "former": "", "inputs": "another"}
    marker.write_text(json.dumps(values))
    assert run(recipe).skipped == ("static",)
    values["claim"]["job"]["options"]["seed"] = 7
    marker.write_text(json.dumps(values))
    refused(recipe, "runs/moe was put into the place")
