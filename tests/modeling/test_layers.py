"""Layers that have as many active experts as they need: moeify's own architecture alone."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file
from test_own_routers import losses_of_checkpoint, losses_of_plan
from transformers import AutoModelForCausalLM

from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import InputError, UsageError
from moeify.kernels import register
from moeify.layout import Layout
from moeify.modeling.modeling_moeify import Router
from moeify.models.stock import load
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training.finetune import finetune

# gpt2 has two layers here, the second is cut otherwise than the first.
OPTIONS = SplitOptions(experts=8, active_by_layer=(3, 6), tokens=1024, calibration=("builtin",), refit=False)


@pytest.fixture(scope="module")
def moe(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint whose layers differ, and its dense model."""
    dense, out = str(make_dense("gpt2")), tmp_path_factory.mktemp("layers") / "out"
    split(dense, out, OPTIONS)
    return out, dense


def test_every_layer_chooses_as_many_as_its_own_number(moe: tuple[Path, str]) -> None:
    out, dense = moe
    config, layout = json.loads((out / "config.json").read_text()), load_plan(out).layout
    assert layout == Layout(8, 1, 4, active_by_layer=(3, 6))
    assert (config["num_experts"], config["num_experts_per_tok"]) == (7, 5)
    assert config["num_experts_per_tok_by_layer"] == [2, 5]
    ids_BC = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = losses_of_plan(out, dense, ids_BC)
    torch.testing.assert_close(losses_of_checkpoint(out, ids_BC), losses, rtol=1e-4, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert [module.num_chosen for module in model.modules() if isinstance(module, Router)] == [2, 5]
    plain = model(ids_BC).logits
    register()
    for implementation in ("eager", "batched_mm", "moeify"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids_BC).logits, plain, rtol=1e-4, atol=1e-4)
    report = verify(str(out), dense)
    assert report.passed, report.checks
    assert "3, 6 in all, layer by layer" in (out / "README.md").read_text()


def test_verify_sees_another_number_of_a_layer(moe: tuple[Path, str], tmp_path: Path) -> None:
    out, dense = moe
    changed = tmp_path / "out"
    changed.mkdir()
    for file in out.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "num_experts_per_tok_by_layer": [3, 5]}))
    wrong = [check for check in verify(str(changed), dense).checks if not check.passed]
    assert [(check.name, check.found) for check in wrong] == [("config is the plan's", "num_experts_per_tok_by_layer")]


@pytest.mark.parametrize("numbers", [[2], [2, 9], [2, 5.0], "2,5", [True, 5]])
def test_a_config_whose_numbers_cannot_be_right_is_refused(
    numbers: object, moe: tuple[Path, str], tmp_path: Path
) -> None:
    config = json.loads((moe[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok_by_layer": numbers}))
    with pytest.raises(InputError, match="num_experts_per_tok_by_layer"):
        load(tmp_path)


def test_a_plan_is_taken_again_and_a_whole_layer_has_all(
    moe: tuple[Path, str], make_dense: MakeDense, tmp_path: Path
) -> None:
    file = "model-00001-of-00001.safetensors"
    split(moe[1], tmp_path / "again", plan=str(moe[0]), refit=False)
    assert (tmp_path / "again" / file).read_bytes() == (moe[0] / file).read_bytes()
    split(moe[1], tmp_path / "whole", OPTIONS, active_by_layer=(8, 5))
    assert load_plan(tmp_path / "whole").layout.dense_layers == (0,)
    assert not any(".h.0." in name and "router" in name for name in load_file(tmp_path / "whole" / file))
    assert verify(str(tmp_path / "whole"), moe[1]).passed


def test_thresholds_give_every_layer_its_own_mean(moe: tuple[Path, str], tmp_path: Path) -> None:
    split(moe[1], tmp_path / "out", OPTIONS, min_active=2, max_active=8)
    plan = load_plan(tmp_path / "out")
    assert [layer.diagnostics["active_experts"] for layer in plan.layers] == pytest.approx([3, 6], abs=0.02)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok_by_layer"] is None
    assert verify(str(tmp_path / "out"), moe[1]).passed


def test_layers_that_differ_are_fitted_one_by_one(moe: tuple[Path, str], tmp_path: Path) -> None:
    out, dense = moe
    result = finetune(str(out), dense, tmp_path / "out", data=("builtin",), tokens=2048, context=64, stage=("layers",))
    assert verify(str(tmp_path / "out"), dense).passed
    assert result.stages[0].stage == "layers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active_by_layer": (3,)}, "has 1 numbers, .* has 2 layers"),
        ({"active_by_layer": (3, 9)}, "9 active of 8 experts is impossible"),
        ({"active_by_layer": (8, 8)}, "every layer is to stay dense"),
        ({"shared": 3}, "a layer of 3 active experts has none to choose beside 3 shared ones"),
        ({"dense_layers": (0,)}, r"has all experts in layers \[\], --dense-layers names \[0\]"),
        ({"experts": None}, "needs to know of how many experts"),
        ({"active": 4}, "says how many experts are active"),
        ({"budget": 0.5}, "a budget chooses how many experts are active"),
        ({"mixing": "soft"}, "is about experts that are chosen"),
        ({"static": True}, "FFNs of one width"),
        ({"min_active": 4}, "4 to 8 active experts are impossible"),
        ({"target": "mixtral"}, "its layers all have as many active experts"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    changes: dict[str, object], message: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    family = "llama" if "target" in changes else "gpt2"
    with pytest.raises((InputError, UsageError), match=message):
        split(str(make_dense(family)), tmp_path / "out", OPTIONS, **changes)


def test_a_static_layer_keeps_as_many_slices_as_its_number() -> None:
    layout = Layout(8, 4, 4, active_by_layer=(3, 6))
    assert [layout.of_layer(layer) for layer in (0, 1)] == [Layout(8, 3, 3), Layout(8, 6, 6)]
    assert layout.model_share(2) == pytest.approx(9 / 16)
