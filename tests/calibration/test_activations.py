"""Activations kept and recomputed are the same bits; statistics against their definitions; massive activations."""

from dataclasses import replace

import pytest
import torch
from conftest import toy_ffn
from torch.nn.functional import gelu, silu

from moeify.calibration import activations as module
from moeify.calibration.activations import CLIP_NORM, Activations, measure
from moeify.models.ffn import FFNWeights


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 tokens are five chunks, the last of them shorter."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", 128)


def chunks_of(activations: Activations) -> list[torch.Tensor]:
    rows, hidden = zip(*activations.chunks(), strict=True)
    assert [part for piece in rows for part in range(piece.start, min(piece.stop, 600))] == list(range(600))
    return list(hidden)


def same(kept: Activations, recomputed: Activations) -> bool:
    pairs = list(zip(chunks_of(kept), chunks_of(recomputed), strict=True))
    return len(pairs) == 5 and all(torch.equal(a, b) for a, b in pairs)


def test_hidden_is_what_down_proj_is_applied_to() -> None:
    ffn, inputs_TD = toy_ffn()
    expected = silu(inputs_TD @ ffn.gate_FD.T) * (inputs_TD @ ffn.up_FD.T)
    torch.testing.assert_close(ffn.hidden(inputs_TD), expected)
    other = replace(ffn, activation="gelu")
    torch.testing.assert_close(other.hidden(inputs_TD), gelu(inputs_TD @ ffn.gate_FD.T) * (inputs_TD @ ffn.up_FD.T))


def test_recomputed_chunks_are_bit_identical_to_kept_ones() -> None:
    ffn, inputs_TD = toy_ffn()
    kept, recomputed = Activations(ffn, inputs_TD), Activations(ffn, inputs_TD, keep_bytes=0)
    assert same(kept, recomputed)
    order_F = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    for activations in (kept, recomputed):
        activations.reorder(order_F)
    assert same(kept, recomputed)
    keep_TR = torch.rand(600, 3, generator=torch.Generator().manual_seed(2)) > 0.5
    for activations in (kept, recomputed):
        activations.mask(keep_TR, 6)
    assert same(kept, recomputed)
    # Twice, because a mask that changes what it is given would be seen only then.
    assert same(kept, recomputed)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_reorder_may_drop_neurons_and_mask_silences_only_the_last_blocks(keep_bytes: int) -> None:
    ffn, inputs_TD = toy_ffn()
    activations = Activations(ffn, inputs_TD, keep_bytes)
    order_F = torch.tensor([5, 0, 7, 9, 2, 11])
    activations.reorder(order_F)
    keep_TR = torch.zeros(600, 2, dtype=torch.bool)
    keep_TR[::2, 0], keep_TR[1::3, 1] = True, True
    activations.mask(keep_TR, 2)
    found = torch.cat(chunks_of(activations))
    full = ffn.hidden(inputs_TD)[:, order_F]
    torch.testing.assert_close(found[:, :2], full[:, :2])
    torch.testing.assert_close(found[:, 2:4], full[:, 2:4] * keep_TR[:, :1])
    torch.testing.assert_close(found[:, 4:], full[:, 4:] * keep_TR[:, 1:])


def test_the_limit_decides_what_is_kept() -> None:
    ffn, inputs_TD = toy_ffn()
    size = 600 * 24 * 4
    assert Activations(ffn, inputs_TD, size)._kept is not None
    assert Activations(ffn, inputs_TD, size - 1)._kept is None


def test_measure_follows_its_definitions() -> None:
    ffn, inputs_TD = toy_ffn()
    stats = measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0)
    hidden_TF = ffn.hidden(inputs_TD).double()
    outputs_TD = hidden_TF @ ffn.down_DF.T.double()
    norm_T = outputs_TD.norm(dim=1)
    weight_T = (CLIP_NORM * norm_T.median() / norm_T).clamp(max=1)
    contribution_TF = hidden_TF * ffn.down_DF.double().norm(dim=0)
    weighted_TF = contribution_TF * weight_T[:, None]
    torch.testing.assert_close(stats.outputs_TD.double(), outputs_TD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.weight_T.double(), weight_T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.energy_F.double(), weighted_TF.square().mean(0), rtol=1e-4, atol=1e-6)
    # All 600 tokens are fewer than a sample takes, and they stay in order; a contribution keeps its sign.
    torch.testing.assert_close(stats.contribution_NF.double(), weighted_TF, rtol=1e-4, atol=1e-5)
    assert bool((stats.contribution_NF < 0).any())
    assert torch.equal(stats.inputs_ND, inputs_TD)
    assert stats.gradient_ND is None
    assert not stats.massive_F.any()


def test_contributions_are_of_a_seeded_sample_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, inputs_TD = toy_ffn()
    everything = measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0).contribution_NF
    monkeypatch.setattr(module, "sample_size", lambda _: 50)
    first, again, other = (measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=s) for s in (3, 3, 4))
    assert first.contribution_NF.shape == (50, 24)
    assert torch.equal(first.contribution_NF, again.contribution_NF)
    assert not torch.equal(first.contribution_NF, other.contribution_NF)
    for stats in (first, other):
        # Inputs and contributions are of the same tokens.
        rows = [int((inputs_TD == row).all(dim=1).nonzero()) for row in stats.inputs_ND]
        assert rows == sorted(set(rows))
        torch.testing.assert_close(stats.contribution_NF, everything[rows])


def test_a_sample_has_a_least_size_and_grows_while_it_is_small() -> None:
    assert module.sample_size(100_000) == module.SAMPLE_TOKENS
    assert module.sample_size(100) * 100 * 4 <= module.SAMPLE_BYTES < (module.sample_size(100) + 1) * 100 * 4


def test_with_gradients_the_sample_is_their_tokens() -> None:
    ffn, inputs_TD = toy_ffn()
    gradient_GD = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    stats = measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0, gradient_GD=gradient_GD)
    assert stats.gradient_ND is not None
    assert torch.equal(stats.gradient_ND, gradient_GD)
    assert torch.equal(stats.inputs_ND, inputs_TD[:200])
    everything = measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0)
    torch.testing.assert_close(stats.contribution_NF, everything.contribution_NF[:200])
    # What is measured on all tokens does not depend on the sample.
    assert torch.equal(stats.energy_F, everything.energy_F)


def test_a_mask_may_hold_weights() -> None:
    ffn, inputs_TD = toy_ffn()
    weights_TR = torch.rand(600, 3, generator=torch.Generator().manual_seed(0))
    for keep_bytes in (0, 1 << 20):
        activations = Activations(ffn, inputs_TD, keep_bytes)
        activations.mask(weights_TR, 8)
        expected = ffn.hidden(inputs_TD).unflatten(1, (3, 8)) * weights_TR[:, :, None]
        torch.testing.assert_close(torch.cat(chunks_of(activations)), expected.flatten(1))


def planted_massive() -> tuple[FFNWeights, torch.Tensor]:
    """Neuron 17 fires for tokens 0, 256 and 511 as nothing else does, as the first token of a text does to a model."""
    ffn, inputs_TD = toy_ffn()
    ffn.gate_FD[17], ffn.up_FD[17] = 0, 0
    ffn.gate_FD[:, 0], ffn.up_FD[:, 0] = 0, 0
    ffn.gate_FD[17, 0], ffn.up_FD[17, 0] = 1, 1
    inputs_TD[:, 0] = 0
    inputs_TD[[0, 256, 511], 0] = 20
    return ffn, inputs_TD


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_massive_neurons_are_found_and_their_tokens_clipped(keep_bytes: int) -> None:
    ffn, inputs_TD = planted_massive()
    stats = measure(ffn, inputs_TD, Activations(ffn, inputs_TD, keep_bytes), seed=0)
    assert stats.massive_F.nonzero().flatten().tolist() == [17]
    norm_T = stats.outputs_TD.norm(dim=1)
    massive = [0, 256, 511]
    assert bool((norm_T[massive] > 50 * norm_T.median()).all())
    torch.testing.assert_close(stats.weight_T[massive] * norm_T[massive], (CLIP_NORM * norm_T.median()).expand(3))
    # Clipped, three tokens of 600 no longer outweigh the rest.
    clipped = norm_T * stats.weight_T
    assert float(clipped.square()[massive].sum() / clipped.square().sum()) < 0.1


def test_one_of_many_small_shares_is_not_massive() -> None:
    ffn, inputs_TD = toy_ffn()
    # Token 7 is large in every neuron: its norm is massive, no neuron's share of it is.
    inputs_TD[7] *= 30
    ffn.down_DF.abs_()
    flat = replace(ffn, gate_FD=ffn.gate_FD[:1].expand(24, 8), up_FD=ffn.up_FD[:1].expand(24, 8))
    stats = measure(flat, inputs_TD, Activations(flat, inputs_TD), seed=0)
    assert stats.outputs_TD.norm(dim=1)[7] > 20 * stats.outputs_TD.norm(dim=1).median()
    assert not stats.massive_F.any()
