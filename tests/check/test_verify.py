"""`verify` passes on what `split` wrote and names the check that fails on everything that can go wrong afterwards."""

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file

from moeify.check.verify import TOLERANCE, VerifyReport, verify
from moeify.convert.pipeline import split
from moeify.errors import InputError
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.targets import ROUTER_LIMIT, ROUTER_SCALE

KEYS = "stock transformers loads every key"
PLACE = "every neuron has one place"
ROWS = "gate and up rows are the dense ones"
LOGITS = "logits equal dense, all experts on"
GATES = "expert weights are one"

Tensors = dict[str, torch.Tensor]
Spoil = Callable[..., VerifyReport]

# Where a target keeps the parts of layer 0 that the tests damage.
NAMES: dict[str, dict[str, str]] = {
    "mixtral": {
        "gate": "model.layers.0.block_sparse_moe.experts.{e}.w1.weight",
        "up": "model.layers.0.block_sparse_moe.experts.{e}.w3.weight",
        "down": "model.layers.0.block_sparse_moe.experts.{e}.w2.weight",
        "router": "model.layers.0.block_sparse_moe.gate.weight",
    },
    "glm4_moe": {
        "gate": "model.layers.0.mlp.experts.{e}.gate_proj.weight",
        "up": "model.layers.0.mlp.experts.{e}.up_proj.weight",
        "down": "model.layers.0.mlp.experts.{e}.down_proj.weight",
        "router": "model.layers.0.mlp.gate.weight",
        "shared_up": "model.layers.0.mlp.shared_experts.up_proj.weight",
    },
}


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> str:
    return str(make_dense("llama"))


@pytest.fixture(scope="module")
def made(dense: str, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """A sound checkpoint of each kind: by target, with and without refit."""
    folders = {}
    for target in NAMES:
        for refit in (True, False):
            out = tmp_path_factory.mktemp("sound") / target
            options = SplitOptions(target=target, refit=refit, tokens=1024, calibration=(str(calibration_file),))
            split(dense, out, options)
            folders[target, refit] = out
    return folders


@pytest.fixture
def spoil(dense: str, made: dict[tuple[str, bool], Path], tmp_path: Path) -> Spoil:
    """spoil(change, target, refit=...) -> the report on a copy whose tensors were changed."""

    def run(change: Callable[[Tensors, dict[str, str]], None], target: str, *, refit: bool = True) -> VerifyReport:
        folder = tmp_path / "copy"
        shutil.copytree(made[target, refit], folder)
        (file,) = folder.glob("model-*.safetensors")
        tensors = load_file(file)
        change(tensors, NAMES[target])
        save_file(tensors, file, metadata={"format": "pt"})
        return verify(str(folder), dense)

    return run


def failed(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def drop(name: str) -> Callable[[Tensors, dict[str, str]], None]:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        del tensors[name]

    return change


def exchange(tensors: Tensors, first: str, second: str, row: int, *, columns: bool = False) -> None:
    """Exchange row (or column) `row` of two tensors."""
    a, b = (tensors[name].T if columns else tensors[name] for name in (first, second))
    a[row], b[row] = b[row].clone(), a[row].clone()


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("refit", [True, False])
def test_a_sound_checkpoint_passes(target: str, refit: bool, dense: str, made: dict[tuple[str, bool], Path]) -> None:
    report = verify(str(made[target, refit]), dense)
    assert report.passed
    assert failed(report) == set()
    assert [check.name for check in report.checks][:3] == [KEYS, PLACE, ROWS]
    assert {LOGITS, GATES} <= {check.name for check in report.checks}
    assert 0 < report.max_logit_difference <= TOLERANCE
    assert 0 < report.max_gate_deviation <= 2 * ROUTER_LIMIT * ROUTER_SCALE


def test_verify_changes_nothing_on_disk(dense: str, made: dict[tuple[str, bool], Path]) -> None:
    folder = made["glm4_moe", True]
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    verify(str(folder), dense)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("refit", [True, False])
def test_two_neurons_that_changed_places_are_seen(target: str, refit: bool, spoil: Spoil) -> None:
    """Moved whole, with gate, up and down: with all experts on the model computes the same, yet it is not the plan."""

    def change(tensors: Tensors, names: dict[str, str]) -> None:
        for part in ("gate", "up", "down"):
            first, second = (names[part].format(e=expert) for expert in (0, 1))
            exchange(tensors, first, second, 2, columns=part == "down")

    assert ROWS in failed(spoil(change, target, refit=refit))


@pytest.mark.parametrize("part", ["gate", "up", "shared_up"])
def test_one_changed_number_in_a_row_is_seen(part: str, spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[names[part].format(e=1)][3, 5] += 1e-6

    report = spoil(change, "glm4_moe")
    assert ROWS in failed(report)
    assert {KEYS, LOGITS, GATES}.isdisjoint(failed(report))
    assert next(check for check in report.checks if check.name == ROWS).found == "127 equal"


@pytest.mark.parametrize("part", ["gate", "up", "shared_up"])
def test_a_row_that_is_another_is_seen_in_the_logits(part: str, spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[names[part].format(e=1)][3] *= -1

    report = spoil(change, "glm4_moe")
    assert {ROWS, LOGITS} <= failed(report)
    assert report.max_logit_difference > 0.01


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"],
)
def test_any_other_weight_is_seen_in_the_logits(name: str, spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[name] *= 1.01

    report = spoil(change, "glm4_moe")
    assert LOGITS in failed(report)
    assert {KEYS, PLACE, ROWS}.isdisjoint(failed(report))


@pytest.mark.parametrize("target", NAMES)
def test_a_router_that_is_not_scaled_down_is_seen(target: str, spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[names["router"]] *= 1000

    report = spoil(change, target)
    assert GATES in failed(report)
    assert LOGITS not in failed(report)
    assert report.max_gate_deviation > 0.1


def test_a_fold_for_another_number_of_experts_is_seen(
    dense: str, made: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made["mixtral", True], folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_experts_per_tok"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    assert GATES in failed(verify(str(folder), dense))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"])
def test_a_missing_tensor_is_seen(name: str, spoil: Spoil) -> None:
    report = spoil(drop(name), "glm4_moe")
    assert KEYS in failed(report)
    assert name in report.checks[0].found


def test_a_tensor_too_many_is_seen(spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors["model.layers.0.extra.weight"] = torch.ones(3)

    report = spoil(change, "glm4_moe")
    assert failed(report) == {KEYS}
    assert "1 unexpected" in report.checks[0].found
    assert "model.layers.0.extra.weight" in report.checks[0].found


def test_labels_that_are_not_those_of_the_weights_are_seen(
    dense: str, made: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made["mixtral", True], folder)
    plan = load_plan(folder)
    labels_F = plan.layers[1].labels_F
    first, second = (int((labels_F == expert).nonzero()[0]) for expert in (0, 1))
    labels_F[first], labels_F[second] = 1, 0
    plan.save(folder / "split_plan.safetensors")
    assert {ROWS, LOGITS} <= failed(verify(str(folder), dense))


def test_another_dense_model_is_seen(make_dense: MakeDense, made: dict[tuple[str, bool], Path]) -> None:
    report = verify(str(made["mixtral", True]), str(make_dense("llama", seed=1)))
    assert {ROWS, LOGITS} <= failed(report)
    assert next(check for check in report.checks if check.name == ROWS).found == "0 equal"


def test_what_cannot_be_compared_is_refused(
    make_dense: MakeDense, dense: str, made: dict[tuple[str, bool], Path]
) -> None:
    moe = str(made["mixtral", True])
    with pytest.raises(InputError, match=r"llama of 2 layers.*qwen3 of 2"):
        verify(moe, str(make_dense("qwen3")))
    with pytest.raises(InputError, match=r"llama of 2 layers.*llama of 3"):
        verify(moe, str(make_dense("llama", num_hidden_layers=3)))
    with pytest.raises(InputError, match="no split plan"):
        verify(dense, dense)
    with pytest.raises(InputError, match="no model at"):
        verify(moe + "-nowhere", dense)


def test_narrow_experts_are_verified(dense: str, calibration_file: Path, tmp_path: Path) -> None:
    options = SplitOptions(16, tokens=1024, calibration=(str(calibration_file),))
    split(dense, tmp_path / "moe", options)
    assert verify(str(tmp_path / "moe"), dense).passed
    with pytest.raises(InputError, match="experts of 2 neurons cannot run in float32") as caught:
        split(dense, tmp_path / "narrower", replace(options, experts=32))
    assert caught.value.hint == "--experts 2, 4, 8, 16 work for this model; --target moeify takes every number"


def test_a_tolerance_decides(dense: str, made: dict[tuple[str, bool], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is off by 1e-4 in every logit, in float64 as in float32."""
    module = importlib.import_module("moeify.check.verify")
    restore = module._restore_dense

    def off(model: Any, *arguments: Any) -> None:
        restore(model, *arguments)
        with torch.no_grad():
            model.model.norm.weight.mul_(1 + 1e-4)

    monkeypatch.setattr(module, "_restore_dense", off)
    moe = str(made["mixtral", True])
    report = verify(moe, dense, tolerance=1e-9)
    assert failed(report) == {LOGITS}
    assert "<= 1e-09" in next(check for check in report.checks if check.name == LOGITS).expected
    assert 0 < report.max_logit_difference < 0.01
    assert verify(moe, dense, tolerance=0.01).passed


def test_rounding_is_told_from_errors(dense: str, made: dict[tuple[str, bool], Path]) -> None:
    """Experts add up in another order than the dense FFN, which float32 shows and float64 does not."""
    assert verify(str(made["mixtral", True]), dense, tolerance=1e-12).passed


def test_a_checkpoint_in_another_dtype_passes(dense: str, calibration_file: Path, tmp_path: Path) -> None:
    """What was asked for is not an error: the dense weights are rounded as the checkpoint's were."""
    options = SplitOptions(target="mixtral", dtype="bfloat16", tokens=1024, calibration=(str(calibration_file),))
    split(dense, tmp_path / "moe", options)
    report = verify(str(tmp_path / "moe"), dense)
    assert {KEYS, PLACE, ROWS, GATES}.isdisjoint(failed(report))
    assert report.passed


# What verify does not see yet. Each of these is a checkpoint that gives wrong text.


def test_a_changed_down_column_without_refit_is_seen(spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[names["down"].format(e=1)][:, 3] *= -1

    assert failed(spoil(change, "mixtral", refit=False))


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("target", NAMES)
def test_a_down_proj_of_nan_is_seen(target: str, refit: bool, spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[names["down"].format(e=1)].fill_(torch.nan)

    assert failed(spoil(change, target, refit=refit))


@pytest.mark.parametrize("target", NAMES)
def test_exchanged_router_rows_are_seen(target: str, spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[names["router"]].copy_(tensors[names["router"]].flip(0).clone())

    assert failed(spoil(change, target))


def test_a_bias_on_the_choice_of_experts_is_seen(spoil: Spoil) -> None:
    def change(tensors: Tensors, names: dict[str, str]) -> None:
        tensors["model.layers.0.mlp.gate.e_score_correction_bias"][0] = 10

    assert failed(spoil(change, "glm4_moe"))


def test_another_number_of_active_experts_is_seen(
    dense: str, made: dict[tuple[str, bool], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made["glm4_moe", True], folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["num_experts_per_tok"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    assert failed(verify(str(folder), dense))


@pytest.mark.parametrize("target", NAMES)
def test_a_missing_expert_is_a_failed_check(target: str, spoil: Spoil) -> None:
    report = spoil(drop(NAMES[target]["down"].format(e=1)), target)
    assert KEYS in failed(report)
