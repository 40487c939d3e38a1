"""Layers of one checkpoint that differ: static ones, some without an FFN, others of fewer experts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from test_own_routers import losses_of_checkpoint, losses_of_plan
from transformers import AutoModelForCausalLM

from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import InputError, UsageError
from moeify.kernels import register
from moeify.layout import Layout
from moeify.models.stock import load
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training.finetune import finetune

FILE = "model-00001-of-00001.safetensors"
# The first layer is static, the second one dense, the third of half as many experts, the fourth without an FFN.
OPTIONS = SplitOptions(
    experts_by_layer=(8, 8, 4, 8),
    active_by_layer=(3, 8, 3, 0),
    static_layers=(0,),
    target="moeify",
    tokens=1024,
    calibration=("builtin",),
)
ALL_STATIC: dict[str, Any] = {
    "experts_by_layer": (),
    "experts": 8,
    "active_by_layer": (2, 5, 8, 3),
    "static_layers": (0, 1, 3),
}


def dense_of(family: str, make_dense: MakeDense) -> str:
    return str(make_dense(family, num_hidden_layers=4))


@pytest.fixture(scope="module")
def moe(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint whose layers differ, of FFNs with biases, and its dense model."""
    dense, out = dense_of("gpt2", make_dense), tmp_path_factory.mktemp("mixed") / "out"
    split(dense, out, OPTIONS)
    return out, dense


def test_a_checkpoint_computes_its_plan(moe: tuple[Path, str], tmp_path: Path) -> None:
    out, dense = moe
    split(dense, tmp_path / "plain", OPTIONS, refit=False)
    layout = load_plan(out).layout
    assert layout == Layout(
        8, 1, 4, (1,), active_by_layer=(3, 8, 3, 0), static_layers=(0,), experts_by_layer=(8, 8, 4, 8)
    )
    assert [layout.is_routed(layer) for layer in range(4)] == [False, False, True, False]
    assert layout.model_share(4) == pytest.approx((3 / 8 + 1 + 3 / 4) / 4)
    ids_BC = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = losses_of_plan(tmp_path / "plain", dense, ids_BC)
    torch.testing.assert_close(losses_of_checkpoint(tmp_path / "plain", ids_BC), losses, rtol=1e-4, atol=1e-4)
    register()
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    plain = model(ids_BC).logits
    for implementation in ("eager", "batched_mm", "moeify"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids_BC).logits, plain, rtol=1e-4, atol=1e-4)


def test_only_what_is_left_is_written(moe: tuple[Path, str]) -> None:
    out, _ = moe
    tensors, sizes = load_file(out / FILE), json.loads((out / "config.json").read_text())["ffn_by_layer"]
    assert [(ffn["num_experts"], ffn["shared_expert_intermediate_size"]) for ffn in sizes] == [
        (0, 24),
        (0, 0),
        (3, 16),
        (0, 0),
    ]
    matrices = {n: t.shape for n, t in tensors.items() if "mlp" in n and t.ndim > 1}
    per_layer = [{n for n in matrices if f".{layer}." in n} for layer in range(4)]
    assert all("shared" in name for name in per_layer[0])
    assert {matrices[name][0] for name in per_layer[2] if "experts" in name or "router" in name} == {3}
    assert not per_layer[3]


def test_verify_proves_what_is_left(moe: tuple[Path, str], tmp_path: Path) -> None:
    out, dense = moe
    report = verify(str(out), dense)
    assert report.passed, report.checks
    # A neuron of the static layer that is another one's, and a column that the plan without a refit has not.
    for part in ("up_proj.weight", "down_proj.weight"):
        split(dense, tmp_path / part, OPTIONS, refit=False)
        tensors = load_file(tmp_path / part / FILE)
        name = next(name for name in tensors if ".0." in name and name.endswith(f"shared.{part}"))
        tensors[name] = tensors[name].clone()
        tensors[name][0, 0] += 1
        save_file(tensors, tmp_path / part / FILE, {"format": "pt"})
        assert not verify(str(tmp_path / part), dense).passed


def test_a_plan_is_taken_again_and_the_card_says_it(moe: tuple[Path, str], tmp_path: Path) -> None:
    out, dense = moe
    split(
        dense, tmp_path / "again", SplitOptions(target="moeify", calibration=("builtin",), tokens=1024), plan=str(out)
    )
    assert (tmp_path / "again" / FILE).read_bytes() == (out / FILE).read_bytes()
    card = (out / "README.md").read_text()
    assert "but 1 cut into 8, 8, 4, 8 equal slices" in card
    assert "layers 0 choose none" in card


def test_it_is_trained(moe: tuple[Path, str], tmp_path: Path) -> None:
    out, dense = moe
    stages = ("layers", "full")
    finetune(str(out), dense, tmp_path / "out", data=("builtin",), tokens=1024, context=64, stage=stages, batch=4)
    assert verify(str(tmp_path / "out"), dense).passed


def test_thresholds_and_layers_that_are_dropped(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = dense_of("llama", make_dense)
    split(dense, tmp_path / "out", OPTIONS, max_active=8, static_layers=(0,), drop_layers=(1,))
    plan = load_plan(tmp_path / "out")
    assert (plan.layout.active_by_layer, plan.layout.static_layers) == ((3, 3, 0), (0,))
    assert plan.layout.of_layer(1) == Layout(4, 1, 3, min_active=1, max_active=4)
    assert verify(str(tmp_path / "out"), dense).passed


def test_every_layer_may_be_static(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = dense_of("gpt2", make_dense)
    split(dense, tmp_path / "out", OPTIONS, **ALL_STATIC)
    assert not any("router" in name for name in load_file(tmp_path / "out" / FILE))
    assert "pruned" in (tmp_path / "out" / "README.md").read_text()
    assert verify(str(tmp_path / "out"), dense).passed
    with pytest.raises(InputError, match="has no routers to train"):
        finetune(str(tmp_path / "out"), dense, tmp_path / "router", data=("builtin",), tokens=1024, stage=("router",))


@pytest.mark.parametrize(
    "ffns",
    [
        [{}],
        [{}, {}, {}, 7],
        [{}, {}, {"num_experts": 2}, {}],
        [{}, {}, {"num_experts": -1}, {}],
        [{}, {}, {"router_width": 1}, {}],
        [{}, {}, {"moe_intermediate_size": 0}, {}],
    ],
)
def test_a_config_whose_layers_cannot_be_right_is_refused(ffns: Any, moe: tuple[Path, str], tmp_path: Path) -> None:
    config = json.loads((moe[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "ffn_by_layer": ffns}))
    with pytest.raises(InputError, match="ffn_by_layer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_by_layer": (8, 4)}, "--experts-by-layer has 2 numbers, .* has 4 layers"),
        ({"experts_by_layer": (8, 8, 4, 1)}, "--experts-by-layer"),
        ({"experts": 16}, "has up to 8 experts, --experts 16"),
        ({"active": 4}, "says how many experts are active"),
        ({"active_by_layer": (3, 8, 5, 0)}, "5 active of 4 experts"),
        ({"active_by_layer": (8, 8, 4, 0)}, "no layer has fewer active|to keep 8 slices and to stay dense"),
        ({"active_by_layer": (3, 8, 1, 0), "shared": 1}, "a layer of 1 active experts has none to choose beside 1"),
        ({"static_layers": (4,)}, "there is no layer 4 to leave static"),
        ({"static_layers": (1,)}, "layer 1 is to keep 8 slices and to stay dense"),
        ({"drop_layers": (0,)}, "layer 0 is to stay static and to go"),
        ({"static": True, "target": "auto"}, "--static prunes every layer alike"),
        ({"mixing": "soft"}, "is about experts that are chosen"),
        ({"budget": 0.5}, "a budget chooses"),
        ({"machine": "ram=50"}, "--for chooses the layout"),
        ({"target": "mixtral"}, "its layers"),
        ({"max_active": 8, "min_active": 7}, "active experts are impossible"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: Mapping[str, Any], message: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        split(dense_of("llama", make_dense), tmp_path / "out", OPTIONS, **changes)
