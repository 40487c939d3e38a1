"""Tokens that get as many experts as they need: a threshold on scores in place of a number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file
from test_own_routers import losses_of_checkpoint, losses_of_plan
from transformers import AutoModelForCausalLM

from moeify.benchmark.models.expert_use import expert_use
from moeify.check.active import ActiveShare
from moeify.check.evaluate import evaluate
from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.errors import InputError, UsageError
from moeify.experts.mixing import UNIT
from moeify.kernels import register
from moeify.layout import Layout
from moeify.modeling.modeling_moeify import Router
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training.finetune import finetune
from moeify.training.model import Student
from moeify.training.thresholds import Thresholds

OPTIONS = SplitOptions(
    experts=8, shared=1, active=4, min_active=2, max_active=7, tokens=1024, calibration=("builtin",), refit=False
)


def test_a_token_gets_as_many_experts_as_score_above_zero() -> None:
    layout = Layout(6, 1, 3, min_active=2, max_active=4)
    scores_TR = torch.tensor([[1.0, 2, 3, 4, 5], [-1, -2, -3, -4, -5], [1, -1, 2, -2, -3]])
    expected = [[0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0]]
    assert UNIT.weights(scores_TR, layout).int().tolist() == expected


@pytest.mark.parametrize(("family", "router"), [("gpt2", "ridge"), ("gemma3_text", "ridge"), ("gpt2", "mlp")])
def test_a_checkpoint_chooses_as_its_plan(family: str, router: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense, out = str(make_dense(family)), tmp_path / "out"
    result = split(dense, out, OPTIONS, router=router)
    assert (result.layout.min_active, result.layout.max_active, result.layout.num_active) == (2, 7, 4)
    for layer in load_plan(out).layers:
        # The threshold is calibrated: over the calibration tokens the mean is what was asked for.
        assert layer.diagnostics["active_experts"] == pytest.approx(4, abs=0.02)
    report = verify(str(out), dense)
    assert report.passed, report.checks
    assert report.max_gate_deviation == 0
    ids_BC = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = losses_of_plan(out, dense, ids_BC)
    torch.testing.assert_close(losses_of_checkpoint(out, ids_BC), losses, rtol=1e-4, atol=1e-4)
    model, counts = AutoModelForCausalLM.from_pretrained(out).eval(), []

    def count(_: object, __: object, outputs: tuple[torch.Tensor, ...]) -> None:
        counts.extend((outputs[2] < 7).sum(dim=1).tolist())

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(count)
    with ActiveShare(model) as active:
        plain = model(ids_BC).logits
    assert active.share is not None
    assert active.share == pytest.approx((1 + sum(counts) / len(counts)) / 8)
    assert len(set(counts)) > 1
    assert set(counts) <= set(range(1, 7))
    register()
    for implementation in ("eager", "batched_mm", "moeify"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids_BC).logits, plain, rtol=1e-4, atol=1e-4)


def test_a_plan_with_thresholds_is_taken_again(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = str(make_dense("gpt2"))
    split(dense, tmp_path / "one", OPTIONS)
    split(dense, tmp_path / "two", plan=str(tmp_path / "one"), refit=False)
    one, two = ((tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    moe, original = evaluate([str(tmp_path / "one"), dense], "builtin-heldout", tokens=512)
    assert moe.active_share is not None
    assert 2 / 8 < moe.active_share < 7 / 8
    assert original.active_share is None


@pytest.fixture(scope="module")
def adaptive(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    dense, out = str(make_dense("llama")), tmp_path_factory.mktemp("adaptive") / "out"
    split(dense, out, OPTIONS)
    return out, dense


def test_it_is_trained_with_routers_as_they_are(adaptive: tuple[Path, str], tmp_path: Path) -> None:
    (out, dense), tuned = adaptive, tmp_path / "tuned"
    training = {"data": ("builtin",), "tokens": 1024, "context": 64, "eval_tokens": 128, "stage": ("full",)}
    finetune(str(out), dense, tuned, **training)
    before, after = (load_file(folder / "model-00001-of-00001.safetensors") for folder in (out, tuned))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".router.weight" in name}
    assert verify(str(tuned), dense).passed
    with pytest.raises(InputError, match="its routers stay as they were fitted"):
        finetune(str(out), dense, tmp_path / "other", **training, router_rate=0.01)


def test_thresholds_are_settled_by_what_scores_have_become(adaptive: tuple[Path, str]) -> None:
    student = Student.open(adaptive[0], load_plan(adaptive[0]))
    ids_BC = torch.randint(3, 200, (8, 64), generator=torch.Generator().manual_seed(0))
    thresholds = Thresholds(student, {"input_ids": ids_BC}, half=False)
    shares = [share_of(student.model, ids_BC)]
    for router in student.routers:
        router.weight.data += 0.5 * router.weight.data.roll(1, 0) + 0.1
    shares.append(share_of(student.model, ids_BC))
    thresholds.settle(student.model.base_model)
    shares.append(share_of(student.model, ids_BC))
    assert shares[2] == pytest.approx(shares[0], abs=1e-3)
    assert abs(shares[1] - shares[0]) > 0.01


@torch.no_grad()
def share_of(model: Any, ids_BC: torch.Tensor) -> float:
    with ActiveShare(model) as active:
        model(ids_BC)
    assert active.share is not None
    return active.share


def test_layers_are_fitted_to_what_thresholds_choose(taught: Path, tmp_path: Path) -> None:
    split(str(taught), tmp_path / "out", OPTIONS)
    text: dict[str, Any] = {"data": ("builtin",), "tokens": 4096, "context": 64, "eval_tokens": 128}
    (stage,) = finetune(str(tmp_path / "out"), str(taught), tmp_path / "tuned", **text, stage=("layers",)).stages
    assert stage.after["layer_error"] < stage.before["layer_error"]
    before, after = evaluate([str(tmp_path / "out"), str(tmp_path / "tuned")], "builtin", tokens=2048)
    assert after.perplexity < before.perplexity
    assert verify(str(tmp_path / "tuned"), str(taught)).passed


def test_what_its_experts_do_is_counted(adaptive: tuple[Path, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(adaptive[0]).eval()
    ids_BC = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    with ActiveShare(model) as active:
        use = expert_use(model, {"text": ids_BC}, str)
    assert active.share is not None
    for layer in use:
        assert sum(layer.load) == pytest.approx(1)
        assert 0 < layer.random_capture < layer.oracle_capture + 1e-6 <= 1 + 2e-6
    # Of 7 routed experts, beside one of 8 that is shared; whatever the choice, on average a random one gets its share.
    assert sum(layer.random_capture for layer in use) / len(use) > (8 * active.share - 1) / 7 / 2


@pytest.mark.parametrize("changes", [{"static": True, "shared": None}, {"mixing": "soft"}, {"fusion": "mean"}])
def test_what_has_no_threshold_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="choose experts of weight one by their scores"):
        SplitOptions.chosen(OPTIONS, changes)


@pytest.mark.parametrize("changes", [{"min_active": 5}, {"max_active": 3}, {"max_active": 9}])
def test_a_range_without_the_mean_is_refused(changes: dict[str, int], make_dense: MakeDense, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\d to \d active experts are impossible"):
        split(str(make_dense("gpt2")), tmp_path / "out", OPTIONS, **changes)


def test_stock_architectures_give_every_token_as_many(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = str(make_dense("llama"))
    with pytest.raises(InputError, match="its tokens all have as many experts"):
        split(dense, tmp_path / "out", OPTIONS, target="mixtral", shared=0)
    assert split(dense, tmp_path / "out", OPTIONS).target == "moeify"
