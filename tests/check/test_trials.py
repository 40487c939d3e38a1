"""Conversions tried out in memory: what they lose is what a written checkpoint loses on the same text."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, MakeDense
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeify.check import trials as trial
from moeify.check.baselines import NeuronOracle
from moeify.check.trials import Trials
from moeify.convert.layer import ConvertedFFN, fit_layer
from moeify.convert.pipeline import split
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.texts import calibration_text
from moeify.data.text import evaluation_tokens
from moeify.models.builtin import builtin_documents
from moeify.models.dense import open_dense
from moeify.options import SplitOptions

BLOCKS = 6


@dataclass(frozen=True)
class Bench:
    """One model and its two texts."""

    model: Path
    options: dict[str, Any]
    calibration_BC: Tensor
    evaluation_BC: Tensor

    def prepare(self, **changed: Any) -> Prepared:
        return prepare(open_dense(str(self.model)), SplitOptions(**{**self.options, **changed}), writable=False)

    def trials(self, evaluation_BC: Tensor | None = None) -> Trials:
        evaluation_BC = self.evaluation_BC if evaluation_BC is None else evaluation_BC
        return Trials(self.prepare(), self.calibration_BC, evaluation_BC)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def bench(
    request: Any, make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    model = make_dense(request.param, num_hidden_layers=3, intermediate_size=128)
    options = {"calibration": (str(calibration_file),), "tokens": 1024, "dtype": "float32"}
    prepared = prepare(open_dense(str(model)), SplitOptions(**options))
    heldout = tmp_path_factory.mktemp("heldout") / "text.txt"
    heldout.write_text("\n\n".join(builtin_documents(heldout=True)))
    ids_T = evaluation_tokens(str(heldout), prepared.dense.tokenizer(), num_tokens=BLOCKS * CONTEXT).ids_T
    return Bench(model, options, calibration_text(prepared).ids_BC, ids_T.view(BLOCKS, CONTEXT))


@torch.no_grad()
def stock_losses(folder: Path, ids_BC: Tensor) -> Tensor:
    """losses_BL by stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits_BLV = model(ids_BC).logits[:, :-1]
    losses: Tensor = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), ids_BC[:, 1:], reduction="none")
    return losses


def test_a_dense_control_loses_what_the_stock_model_loses(bench: Bench) -> None:
    found = bench.trials().control(lambda ffn, _: ffn)
    assert found.losses_BL.shape == (BLOCKS, CONTEXT - 1)
    assert found.diagnostics == {}
    torch.testing.assert_close(found.losses_BL, stock_losses(bench.model, bench.evaluation_BC), atol=1e-4, rtol=1e-4)


def test_a_control_is_fitted_to_calibration_tokens_and_used_on_all(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []

    def control(ffn: Any, fit_TD: Tensor) -> Callable[[Tensor], Tensor]:
        def run(inputs_TD: Tensor) -> Tensor:
            assert torch.equal(inputs_TD[: len(fit_TD)], fit_TD)
            seen.append((len(fit_TD), len(inputs_TD)))
            return NeuronOracle(ffn, 0.5)(inputs_TD)

        return run

    found = bench.trials().control(control)
    assert seen == [(1024, 1024 + BLOCKS * CONTEXT)] * 3
    dense = stock_losses(bench.model, bench.evaluation_BC)
    assert not torch.allclose(found.losses_BL, dense, atol=0.01)


SPLITS: list[dict[str, Any]] = [
    {},
    {"refit": False, "active": 3},
    {"refit_to": "stream"},
    {"partition": "gradient"},
    {"dense_layers": (1,), "active": 4},
    {"static": True},
]


@pytest.mark.parametrize("options", SPLITS, ids=str)
def test_a_split_loses_what_its_checkpoint_loses(bench: Bench, options: dict[str, Any], tmp_path: Path) -> None:
    written = split(str(bench.model), tmp_path / "out", SplitOptions(**{**bench.options, **options}))
    expected_BL = stock_losses(written.out, bench.evaluation_BC)
    found = bench.trials().split(bench.prepare(**options))
    perplexities = [math.exp(float(losses_BL.mean())) for losses_BL in (found.losses_BL, expected_BL)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)
    # Not only the mean: the split moves single tokens much further than rounding does.
    moved = (stock_losses(bench.model, bench.evaluation_BC) - expected_BL).abs().mean()
    assert (found.losses_BL - expected_BL).abs().mean() < 0.01
    assert moved > 0.1
    # The diagnostics are means of those in the plan.
    plan = [layer.diagnostics for layer in written.plan.layers if layer.diagnostics]
    assert set(found.diagnostics) == {name for layer in plan for name in layer}
    for name, value in found.diagnostics.items():
        values = [layer[name] for layer in plan if name in layer]
        assert value == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("options", SPLITS, ids=str)
def test_evaluation_text_does_not_influence_the_fit(
    bench: Bench, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other text in the same places, or more of it: the same plans."""
    plans: list[Any] = []

    def noting(*arguments: Any, **keywords: Any) -> tuple[ConvertedFFN, Tensor]:
        fitted = fit_layer(*arguments, **keywords)
        plans.append(fitted[0].plan)
        return fitted

    monkeypatch.setattr(trial, "fit_layer", noting)
    others_BC = torch.randint(
        int(bench.evaluation_BC.max()), (BLOCKS, CONTEXT), generator=torch.Generator().manual_seed(3)
    )
    first = bench.trials().split(bench.prepare(**options))
    second = bench.trials(others_BC).split(bench.prepare(**options))
    assert len(plans) == 6
    for one, other in zip(plans[:3], plans[3:], strict=True):
        assert torch.equal(one.labels_F, other.labels_F)
        for part in ("router_RD", "down_DF"):
            assert (getattr(one, part) is None) == (getattr(other, part) is None)
            if getattr(one, part) is not None:
                assert torch.equal(getattr(one, part), getattr(other, part))
    assert first.diagnostics == second.diagnostics
    assert not torch.equal(first.losses_BL, second.losses_BL)


def test_gradients_are_taken_once_and_only_if_they_are_needed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    really = trial.output_gradients

    def counting(dense: Any, inputs: Any, device: str) -> list[Tensor]:
        calls.append(inputs)
        return really(dense, inputs, device)

    monkeypatch.setattr(trial, "output_gradients", counting)
    trials = bench.trials()
    trials.split(bench.prepare())
    assert not calls
    trials.split(bench.prepare(partition="gradient"))
    trials.split(bench.prepare(partition="gradient", active=4))
    assert len(calls) == 1
    assert torch.equal(calls[0]["input_ids"], bench.calibration_BC)


def test_a_refit_to_the_stream_aims_elsewhere(bench: Bench) -> None:
    trials = bench.trials()
    own, stream = (trials.split(bench.prepare(active=3, refit_to=to)) for to in ("ffn", "stream"))
    assert not torch.equal(own.losses_BL, stream.losses_BL)
    assert own.diagnostics["error_with_refit"] != stream.diagnostics["error_with_refit"]


def test_what_no_checkpoint_holds_is_measured(bench: Bench) -> None:
    """A router with a hidden layer, and an architecture without shared experts for a model with biases."""
    prepared = bench.prepare(router="mlp", partition="kmeans", shared=0)
    found = bench.trials().split(prepared)
    assert found.losses_BL.isfinite().all()
    assert found.diagnostics["router_energy_of_oracle"] > 0
