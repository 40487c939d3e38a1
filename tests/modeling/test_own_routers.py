"""Routers that no stock architecture has, in moeify's own: with a hidden layer, and weights that a softmax gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeify.calibration.stream import HiddenStream
from moeify.check.verify import verify
from moeify.convert.layer import ConvertedFFN
from moeify.convert.pipeline import split
from moeify.errors import InputError, UsageError
from moeify.experts.mixing import Mixing
from moeify.models.dense import open_dense
from moeify.options import SplitOptions, Style
from moeify.plan import PLAN_FILE, load_plan
from moeify.routers import LinearRouter
from moeify.training.finetune import finetune

BASE = SplitOptions(experts=8, active=5, tokens=1024, calibration=("builtin",), refit=False)


@torch.no_grad()
def losses_of_plan(out: Path, dense: str, ids_BC: torch.Tensor) -> torch.Tensor:
    """Of what the plan says, computed as a split does."""
    plan, source = load_plan(out), open_dense(dense)
    stream = HiddenStream(source, {"input_ids": ids_BC})
    for layer in plan.layers:
        inputs_TD, ffn = stream.attend(layer.layer), source.ffn(layer.layer).map(torch.Tensor.float)
        router = (
            LinearRouter(layer.router_RD, layer.units_HC, layer.threshold_R) if layer.router_RD is not None else None
        )
        stream.advance(
            ConvertedFFN(ffn, layer, plan.layout.of_layer(layer.layer), Mixing.of(plan.options), router)(inputs_TD)
        )
    return stream.losses(ids_BC)


@torch.no_grad()
def losses_of_checkpoint(out: Path, ids_BC: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    logits_BCV = model(ids_BC).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BCV.transpose(1, 2), ids_BC[:, 1:], reduction="none")


@pytest.mark.parametrize(
    ("router", "style", "temperature", "fusion"),
    [("mlp", "hard", 1.0, "sum"), ("mlp", "softmax", 0.5, "sum"), ("ridge", "soft", 0.5, "mean")],
)
def test_a_checkpoint_routes_as_its_plan(
    router: str,
    style: Style,
    temperature: float,
    fusion: Any,
    make_dense: MakeDense,
    tmp_path: Path,
) -> None:
    dense, out = str(make_dense("gpt2")), tmp_path / "out"
    options = replace(BASE, router=router, mixing=style, temperature=temperature, fusion=fusion, target="moeify")
    split(dense, out, replace(options, active=None) if style == "soft" else options)
    ids_BC = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = losses_of_checkpoint(out, ids_BC)
    torch.testing.assert_close(losses, losses_of_plan(out, dense, ids_BC), rtol=1e-4, atol=1e-4)
    if fusion == "sum":
        assert verify(str(out), dense).passed
    routers = [name for name in load_file(out / "model-00001-of-00001.safetensors") if ".router." in name]
    assert len(routers) == (3 if router == "mlp" else 1) * 2


@pytest.fixture(scope="module")
def with_hidden_layer(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint whose routers have a hidden layer, and its dense model."""
    dense, out = str(make_dense("gpt2")), tmp_path_factory.mktemp("hidden") / "out"
    split(dense, out, replace(BASE, router="mlp", remote_code=True))
    return out, dense


def test_a_plan_with_a_hidden_layer_is_taken_again_and_verify_knows_it(
    with_hidden_layer: tuple[Path, str], tmp_path: Path
) -> None:
    (one, dense), two = with_hidden_layer, tmp_path / "two"
    split(dense, two, plan=str(one), refit=False)
    file = "model-00001-of-00001.safetensors"
    assert (one / file).read_bytes() == (two / file).read_bytes()
    weights = load_file(two / file)
    name = next(name for name in weights if name.endswith("router.hidden_bias"))
    weights[name][3] += 1
    save_file(weights, two / file, {"format": "pt"})
    wrong = [check.name for check in verify(str(two), dense).checks if not check.passed]
    assert wrong == ["experts and routers are the plan's"]


def test_a_router_behind_a_hidden_layer_is_trained_and_written(
    with_hidden_layer: tuple[Path, str], tmp_path: Path
) -> None:
    (out, dense), tuned = with_hidden_layer, tmp_path / "tuned"
    finetune(str(out), dense, tuned, data=("builtin",), tokens=2048, context=64, stage=("layers",))
    report = verify(str(tuned), dense)
    assert report.passed, report.checks
    assert load_plan(tuned).router_width == load_plan(out).router_width > 0
    assert (tuned / "modeling_moeify.py").read_bytes() == (out / "modeling_moeify.py").read_bytes()


def test_a_hidden_layer_that_is_not_finite_is_refused(with_hidden_layer: tuple[Path, str], tmp_path: Path) -> None:
    plan = load_plan(with_hidden_layer[0])
    first, *others = plan.layers
    assert first.units_HC is not None
    broken = replace(first, units_HC=torch.full_like(first.units_HC, torch.inf))
    replace(plan, layers=(broken, *others)).save(tmp_path / PLAN_FILE)
    with pytest.raises(InputError, match="router with NaN or infinite values"):
        load_plan(tmp_path)


def test_a_stock_architecture_has_no_hidden_layer(
    with_hidden_layer: tuple[Path, str], make_dense: MakeDense, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="the plan has routers with a hidden layer, granitemoeshared has linear ones"):
        split(str(make_dense("llama")), tmp_path / "out", plan=str(with_hidden_layer[0]))
