"""`moeify init`: what it writes is a recipe that runs, for every kind of model, whatever it is called."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense
from tiny_images import make_model

from moeify import targets
from moeify.cli.app import run_command
from moeify.errors import InputError
from moeify.options import MachineOptions
from moeify.recipes.init import HEADER, init
from moeify.recipes.model import load_recipe
from moeify.recipes.preview import preview_run
from moeify.recipes.run import run

# Told, so that nothing has to be measured.
MACHINE = MachineOptions(vram="0", ram="8GB", ram_bandwidth=20)


@pytest.mark.parametrize(
    ("family", "values", "target"),
    [
        ("llama", {}, "granitemoeshared"),
        ("mistral", {"sliding_window": 16}, "mixtral"),
        ("qwen3", {}, "glm4_moe"),
        ("gpt2", {}, "moeify"),
    ],
)
def test_the_recipe_is_one_that_runs(
    family: str,
    values: dict[str, Any],
    target: str,
    make_dense: MakeDense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = str(make_dense(family, intermediate_size=128, **values))
    result = init(dense, Path("own-recipe.yaml"), MACHINE)
    assert result.target == target
    text = Path("own-recipe.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 140
    recipe = load_recipe(Path("own-recipe.yaml"))
    assert recipe.out == Path("runs/own")
    assert recipe.split.active == result.layout.num_active
    assert not recipe.split.static
    assert list(preview_run(recipe).splits) == ["moe", "static"]
    # What stands there as a comment is a section too.
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    begin = lines.index("finetune:")
    Path("trained.yaml").write_text(text + "\n".join(lines[begin : begin + 4]) + "\n")
    assert load_recipe(Path("trained.yaml")).finetune is not None


def test_the_pruned_one_runs_to_its_end(make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no target holds, were there no architecture of moeify's own."""
    stock = [name for name in targets.names() if targets.find(name).is_stock]
    monkeypatch.setattr(targets, "names", lambda: stock)
    monkeypatch.chdir(tmp_path)
    init(str(make_dense("gpt2", intermediate_size=128)), Path("r.yaml"), MACHINE)
    result = run(load_recipe(Path("r.yaml"), ["split.tokens=1024", "eval.tokens=100"]))
    assert result.passed
    assert [Path(row.model).name for row in result.evals][1:] == ["moe"]


@pytest.mark.parametrize("name", ["a: b #c", "yes", "1.0", "[x]", "a\nlimits: {}", "'\"", "\u202eb", "é"])
def test_any_name_stays_one(name: str, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).symlink_to(make_dense("llama", intermediate_size=128))
    init(name, Path("r.yaml"), MACHINE)
    assert load_recipe(Path("r.yaml")).model == name


def test_the_command(
    make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_dense("llama", intermediate_size=128), "own")
    told = ["--vram", "0", "--ram", "8GB", "--ram-bandwidth", "20"]
    assert run_command(["init", "own", *told]) == 0
    said = capsys.readouterr().out
    assert "next: moeify run own-recipe.yaml --dry-run" in said
    assert max(map(len, said.splitlines())) <= 80
    assert run_command(["init", "own", *told]) == 3
    assert "own-recipe.yaml exists" in capsys.readouterr().err
    assert run_command(["init", "own", *told, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "own-recipe.yaml"
    assert run_command(["run", "own-recipe.yaml", "--dry-run"]) == 0


def test_nothing_of_others_is_replaced(dense_models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\n")
    with pytest.raises(InputError, match=r"mine\.yaml is no yaml file that moeify wrote"):
        init(str(dense_models["llama"]), file, MACHINE, overwrite=True)
    assert file.read_text() == "version: 1\n"
    with pytest.raises(InputError, match=r"is no \.yaml file"):
        init(str(dense_models["llama"]), tmp_path / "mine.txt", MACHINE)
    file.write_text(HEADER)
    init(str(dense_models["llama"]), file, MACHINE, overwrite=True)
    assert load_recipe(file).version == 1


def test_a_model_of_images_has_images_in_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    init(str(make_model(tmp_path / "own", "vit", "ViTModel")), Path("own-recipe.yaml"))
    recipe = load_recipe(Path("own-recipe.yaml"))
    assert recipe.split.calibration == ("digits",)
    assert recipe.eval is not None
    assert recipe.eval.data == ("digits-heldout",)
    # How long it will take is estimated as well.
    assert [stage.name for stage in preview_run(Path("own-recipe.yaml")).stages][-1] == "bench"
