"""Stage layers: what an expert is worth is exact, a layer never gets worse, and what is stored is what was fitted."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import toy_ffn
from torch import Tensor

from moeify.convert.pipeline import split
from moeify.experts.mixing import Mixing, choose_experts
from moeify.layout import Layout
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.training import layers as finetune_layers
from moeify.training.layers import LayerFFN, _expert_grams, _fit, _ranking_loss, _stored, _student_ffn, _worth
from moeify.training.model import Student
from moeify.training.options import FinetuneOptions


@dataclass
class Worse:
    """A refit that makes everything worse."""

    down_DF: Tensor


LAYOUT = Layout(num_experts=6, num_shared=1, num_active=3)


@pytest.fixture
def toy() -> tuple[LayerFFN, Tensor, Tensor]:
    """A routed FFN with a random router, its inputs_TD and what the dense FFN gives."""
    ffn, inputs_TD = toy_ffn(num_neurons=24, hidden=8, num_tokens=400)
    router_RD = torch.randn(LAYOUT.num_routed, 8, generator=torch.Generator().manual_seed(1))
    return LayerFFN(ffn, LAYOUT, Mixing(), router_RD), inputs_TD, ffn(inputs_TD)


def masked(ffn: LayerFFN, inputs_TD: Tensor, keep_TR: Tensor) -> Tensor:
    """outputs_TD if these experts are on."""
    hidden_TF = ffn.ffn.hidden(inputs_TD)
    on_TF = torch.cat([torch.ones(len(keep_TR), ffn.width), keep_TR.float().repeat_interleave(ffn.width, dim=1)], dim=1)
    return (hidden_TF * on_TF) @ ffn.ffn.down_DF.T


def test_worth_is_the_error_that_one_expert_takes_away(toy: tuple[LayerFFN, Tensor, Tensor]) -> None:
    ffn, inputs_TD, wanted_TD = toy
    assert ffn.router_RD is not None
    keep_TR = choose_experts(inputs_TD @ ffn.router_RD.T, LAYOUT)
    torch.testing.assert_close(ffn(inputs_TD), masked(ffn, inputs_TD, keep_TR))
    worth_TR = _worth(ffn, _expert_grams(ffn), inputs_TD, wanted_TD)
    for expert in range(LAYOUT.num_routed):
        with_TR, without_TR = keep_TR.clone(), keep_TR.clone()
        with_TR[:, expert], without_TR[:, expert] = True, False
        errors = [(wanted_TD - masked(ffn, inputs_TD, keep)).square().sum(1) for keep in (without_TR, with_TR)]
        torch.testing.assert_close(worth_TR[:, expert], errors[0] - errors[1], rtol=1e-4, atol=1e-3)


def test_the_ranking_loss_pulls_up_what_is_worth_more() -> None:
    scores_TR = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    worth_TR = torch.tensor([[5.0, 0.0, 4.0, 1.0, 0.5]])
    _ranking_loss(scores_TR, worth_TR, LAYOUT).backward()
    assert scores_TR.grad is not None
    pushed = scores_TR.grad[0]
    assert pushed[1] > 0 > pushed[2]


def test_a_fit_helps_held_out_tokens_and_moves_the_router(toy: tuple[LayerFFN, Tensor, Tensor]) -> None:
    ffn, inputs_TD, wanted_TD = toy
    fitted, before, after = _fit(ffn, inputs_TD, wanted_TD, FinetuneOptions(router_rate=0.05), seed=0)
    assert after < 0.8 * before
    assert fitted.router_RD is not None
    assert ffn.router_RD is not None
    assert not torch.equal(fitted.router_RD, ffn.router_RD)


def test_a_fit_that_does_not_help_is_not_taken(
    toy: tuple[LayerFFN, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ffn, inputs_TD, wanted_TD = toy
    monkeypatch.setattr(finetune_layers, "_train_router", lambda ffn, *_, **__: replace(ffn, router_RD=-ffn.router_RD))
    monkeypatch.setattr(finetune_layers, "refit", lambda _, __, down_DF, *___, **____: Worse(3 * down_DF))
    fitted, before, after = _fit(ffn, inputs_TD, wanted_TD, FinetuneOptions(), seed=0)
    assert fitted is ffn
    assert after == before


def test_a_silent_router_and_a_silent_ffn_stay_as_they_are(toy: tuple[LayerFFN, Tensor, Tensor]) -> None:
    ffn, inputs_TD, wanted_TD = toy
    assert ffn.router_RD is not None
    silent = replace(ffn, router_RD=torch.zeros_like(ffn.router_RD))
    fitted, _, _ = _fit(silent, inputs_TD, torch.zeros_like(wanted_TD), FinetuneOptions(), seed=0)
    assert fitted.router_RD is not None
    assert fitted.router_RD.abs().max() == 0


@pytest.mark.parametrize("target", ["granitemoeshared", "qwen2_moe", "glm4_moe", "mixtral"])
def test_an_ffn_taken_apart_and_stored_again_is_the_same(taught: Path, tmp_path: Path, target: str) -> None:
    shared = 0 if target == "mixtral" else None
    options = SplitOptions(experts=8, active=4, shared=shared, target=target, tokens=2048, context=64)
    split(str(taught), tmp_path / "moe", options)
    student = Student.open(tmp_path / "moe", load_plan(tmp_path / "moe"))
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    for layer in range(2):
        for name, tensor in _stored(student, layer, _student_ffn(student, layer, "cpu")).items():
            torch.testing.assert_close(before[name], tensor, rtol=1e-6, atol=0)
