"""The refit is the ridge solution, it helps on tokens it has not seen, and it damps more when there are few."""

import pytest
import torch
from conftest import toy_ffn
from torch import Tensor

from moeify.calibration import activations as module
from moeify.calibration.activations import Activations
from moeify.convert.refit import HELD_OUT_SHARE, STRENGTHS, Refit, refit
from moeify.models.ffn import FFNWeights


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boundary to the held-out tokens falls inside a chunk."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", 128)


def outputs(ffn: FFNWeights, inputs_TD: Tensor) -> Tensor:
    return ffn.hidden(inputs_TD) @ ffn.down_DF.T


def routed(ffn: FFNWeights, inputs_TD: Tensor, keep_bytes: int = 1 << 30) -> tuple[Activations, Tensor, Tensor]:
    """Activations, their masked hidden_TF and the order of neurons: 6 shared, 3 experts of 6, two of them used."""
    order_F = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    scores_TR = inputs_TD @ torch.randn(inputs_TD.shape[1], 3, generator=torch.Generator().manual_seed(2))
    keep_TR = torch.zeros_like(scores_TR, dtype=torch.bool).scatter_(1, scores_TR.topk(2).indices, value=True)
    activations = Activations(ffn, inputs_TD, keep_bytes)
    activations.reorder(order_F)
    activations.mask(keep_TR, 6)
    hidden_TF = ffn.hidden(inputs_TD)[:, order_F]
    hidden_TF[:, 6:] *= keep_TR.repeat_interleave(6, dim=1)
    return activations, hidden_TF, order_F


def direct(hidden_TF: Tensor, outputs_TD: Tensor, down_DF: Tensor, weight_T: Tensor, strength: float) -> Tensor:
    """The ridge solution in float64, written out."""
    h, y = (t.double() * weight_T[:, None].double() for t in (hidden_TF, outputs_TD))
    gram = h.T @ h
    damped = gram + strength * gram.diagonal().mean() * torch.eye(gram.shape[0], dtype=torch.float64)
    delta = torch.linalg.solve(damped, h.T @ (y - h @ down_DF.T.double()))
    return down_DF.double() + delta.T


def relative_error(hidden_TF: Tensor, outputs_TD: Tensor, down_DF: Tensor) -> float:
    return float((outputs_TD - hidden_TF @ down_DF.T).square().sum() / outputs_TD.square().sum())


def weights(num_tokens: int) -> Tensor:
    return 0.2 + 0.8 * torch.rand(num_tokens, generator=torch.Generator().manual_seed(3))


# Fewer tokens than the 24 neurons make the system one of tokens, 24 and more one of neurons.
@pytest.mark.parametrize("num_tokens", [10, 23, 24, 25, 600])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_a_masked_fit_equals_a_direct_solve(keep_bytes: int, num_tokens: int) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=num_tokens)
    activations, hidden_TF, order_F = routed(ffn, inputs_TD, keep_bytes)
    target_TD, weight_T, down_DF = outputs(ffn, inputs_TD), weights(num_tokens), ffn.down_DF[:, order_F]
    found = refit(activations, target_TD, down_DF, weight_T, seed=0)
    assert found.strength in STRENGTHS
    expected = direct(hidden_TF, target_TD, down_DF, weight_T, found.strength)
    torch.testing.assert_close(found.down_DF.double(), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found.down_DF, down_DF, atol=1e-2)


@pytest.mark.parametrize("num_neurons", [1, 2, 3, 5, 13])
def test_any_width_equals_a_direct_solve(num_neurons: int) -> None:
    ffn, inputs_TD = toy_ffn(num_neurons=num_neurons + 4)
    kept = torch.arange(num_neurons)
    activations = Activations(ffn, inputs_TD)
    activations.reorder(kept)
    target_TD, down_DF = outputs(ffn, inputs_TD), ffn.down_DF[:, kept]
    found = refit(activations, target_TD, down_DF, torch.ones(600), seed=0)
    expected = direct(ffn.hidden(inputs_TD)[:, kept], target_TD, down_DF, torch.ones(600), found.strength)
    torch.testing.assert_close(found.down_DF.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_static_fit_equals_a_direct_solve() -> None:
    ffn, inputs_TD = toy_ffn()
    kept = torch.arange(0, 24, 2)
    activations = Activations(ffn, inputs_TD)
    activations.reorder(kept)
    target_TD, weight_T, down_DF = outputs(ffn, inputs_TD), weights(600), ffn.down_DF[:, kept]
    found = refit(activations, target_TD, down_DF, weight_T, seed=0)
    expected = direct(ffn.hidden(inputs_TD)[:, kept], target_TD, down_DF, weight_T, found.strength)
    assert found.down_DF.shape == (8, 12)
    torch.testing.assert_close(found.down_DF.double(), expected, rtol=1e-3, atol=1e-4)


def test_nothing_dropped_leaves_nothing_to_refit() -> None:
    ffn, inputs_TD = toy_ffn()
    found = refit(Activations(ffn, inputs_TD), outputs(ffn, inputs_TD), ffn.down_DF, torch.ones(600), seed=0)
    torch.testing.assert_close(found.down_DF, ffn.down_DF, rtol=1e-4, atol=1e-5)
    assert found.error_before < 1e-10


def test_an_expert_that_no_token_uses_keeps_its_dense_columns() -> None:
    ffn, inputs_TD = toy_ffn()
    activations = Activations(ffn, inputs_TD)
    keep_TR = torch.tensor([[True, False]]).expand(600, 2)
    activations.mask(keep_TR, 8)
    found = refit(activations, outputs(ffn, inputs_TD), ffn.down_DF, torch.ones(600), seed=0)
    assert torch.equal(found.down_DF[:, 16:], ffn.down_DF[:, 16:])
    assert not torch.allclose(found.down_DF[:, :16], ffn.down_DF[:, :16], atol=1e-3)


def test_the_error_falls_on_text_the_fit_has_not_seen() -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=3000)
    target_TD = outputs(ffn, inputs_TD)
    activations, _, order_F = routed(ffn, inputs_TD[:2000])
    found = refit(activations, target_TD[:2000], ffn.down_DF[:, order_F], torch.ones(2000), seed=0)
    # The same routing on the last thousand tokens.
    _, unseen_TF, _ = routed(ffn, inputs_TD[2000:])
    before = relative_error(unseen_TF, target_TD[2000:], ffn.down_DF[:, order_F])
    after = relative_error(unseen_TF, target_TD[2000:], found.down_DF)
    assert after < 0.9 * before
    # 250 tokens of the same text are held out inside: a guess, but not a wild one.
    assert found.error_before == pytest.approx(before, rel=0.4)
    assert found.error_after == pytest.approx(after, rel=0.5)


def test_the_error_before_is_that_of_the_held_out_tokens() -> None:
    ffn, inputs_TD = toy_ffn()
    activations, hidden_TF, order_F = routed(ffn, inputs_TD)
    target_TD, weight_T = outputs(ffn, inputs_TD), weights(600)
    found = refit(activations, target_TD, ffn.down_DF[:, order_F], weight_T, seed=0)
    tail = slice(round(600 * (1 - HELD_OUT_SHARE)), None)
    weighted = weight_T[tail, None]
    expected = relative_error(hidden_TF[tail] * weighted, target_TD[tail] * weighted, ffn.down_DF[:, order_F])
    assert found.error_before == pytest.approx(expected, rel=1e-4)


def test_fewer_tokens_are_damped_more() -> None:
    def strength(num_tokens: int, seed: int) -> float:
        ffn, inputs_TD = toy_ffn(num_neurons=48, hidden=32, num_tokens=num_tokens, seed=seed)
        activations = Activations(ffn, inputs_TD)
        kept = torch.arange(36)
        activations.reorder(kept)
        return refit(
            activations, outputs(ffn, inputs_TD), ffn.down_DF[:, kept], torch.ones(num_tokens), seed=0
        ).strength

    few, many = ([strength(num_tokens, seed) for seed in range(3)] for num_tokens in (64, 6000))
    assert min(few) > max(many)


@pytest.mark.parametrize("num_tokens", [32, 80, 300, 3000])
def test_the_chosen_strength_is_the_best_one_on_held_out_tokens(num_tokens: int) -> None:
    ffn, inputs_TD = toy_ffn(num_neurons=48, hidden=32, num_tokens=num_tokens)
    kept = torch.arange(36)
    activations = Activations(ffn, inputs_TD)
    activations.reorder(kept)
    target_TD, down_DF, hidden_TF = outputs(ffn, inputs_TD), ffn.down_DF[:, kept], ffn.hidden(inputs_TD)[:, kept]
    found = refit(activations, target_TD, down_DF, torch.ones(num_tokens), seed=0)
    cut = round(num_tokens * (1 - HELD_OUT_SHARE))
    errors = {}
    for strength in STRENGTHS:
        fitted = direct(hidden_TF[:cut], target_TD[:cut], down_DF, torch.ones(cut), strength).float()
        errors[strength] = relative_error(hidden_TF[cut:], target_TD[cut:], fitted)
    # The sketch that ranks strengths is random: a neighbour of nearly the same error is as good.
    assert errors[found.strength] <= 1.02 * min(errors.values())
    assert max(errors.values()) > 1.03 * min(errors.values())


def spoiled_fits() -> tuple[Refit, Refit]:
    """The same fit with every seventh token ignored, once with sensible and once with absurd outputs for it."""
    ffn, inputs_TD = toy_ffn()
    target_TD, weight_T = outputs(ffn, inputs_TD), torch.ones(600)
    weight_T[::7] = 0
    results = []
    for factor in (1, 1000):
        spoiled = target_TD.clone()
        spoiled[::7] *= factor
        activations, _, order_F = routed(ffn, inputs_TD)
        results.append(refit(activations, spoiled, ffn.down_DF[:, order_F], weight_T, seed=0))
    return results[0], results[1]


def test_a_token_without_weight_does_not_count() -> None:
    first, second = spoiled_fits()
    assert torch.equal(first.down_DF, second.down_DF)
    assert (first.error_before, first.error_after) == (second.error_before, second.error_after)


def test_the_error_after_is_that_of_the_held_out_tokens() -> None:
    for seed in range(8):
        ffn, inputs_TD = toy_ffn(num_neurons=24, hidden=4, num_tokens=2000, seed=seed)
        kept = torch.arange(20)
        activations = Activations(ffn, inputs_TD)
        activations.reorder(kept)
        target_TD, down_DF = outputs(ffn, inputs_TD), ffn.down_DF[:, kept]
        found = refit(activations, target_TD, down_DF, torch.ones(2000), seed=seed)
        cut = round(2000 * (1 - HELD_OUT_SHARE))
        hidden_TF = ffn.hidden(inputs_TD)[:, kept]
        fitted = direct(hidden_TF[:cut], target_TD[:cut], down_DF, torch.ones(cut), found.strength).float()
        assert found.error_after == pytest.approx(relative_error(hidden_TF[cut:], target_TD[cut:], fitted), rel=0.05)


@pytest.mark.parametrize("silent", ["gate", "down"])
@pytest.mark.parametrize("num_tokens", [20, 600])
def test_a_silent_ffn_is_left_as_it_is(silent: str, num_tokens: int) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=num_tokens)
    (ffn.gate_FD if silent == "gate" else ffn.down_DF).zero_()
    found = refit(Activations(ffn, inputs_TD), outputs(ffn, inputs_TD), ffn.down_DF, torch.ones(num_tokens), seed=0)
    assert torch.equal(found.down_DF, ffn.down_DF)
    assert found.error_after == found.error_before == 0
