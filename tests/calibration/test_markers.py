"""CMoE's markers against a loop over tokens, and the order of neurons that follows from them."""

import torch
from conftest import toy_ffn
from torch.nn.functional import silu

from moeify.calibration.markers import MARKED_NEURONS, distances, markers


def test_each_token_marks_its_most_active_neurons() -> None:
    ffn, inputs_ND = toy_ffn(num_tokens=50)
    marker_NF, _ = markers(ffn, inputs_ND)
    assert marker_NF.unique().tolist() == [0, 1]
    for token, marker_F in zip(inputs_ND, marker_NF, strict=True):
        unit = token / token.norm()
        score_F = torch.stack(
            [
                (silu(gate @ unit / gate.norm()) * (up @ unit / up.norm())).abs()
                for gate, up in zip(ffn.gate_FD, ffn.up_FD, strict=True)
            ]
        )
        assert set(marker_F.nonzero().flatten().tolist()) == set(score_F.topk(MARKED_NEURONS).indices.tolist())


def test_neurons_come_by_falling_rate() -> None:
    ffn, inputs_ND = toy_ffn(num_tokens=200)
    marker_NF, order_F = markers(ffn, inputs_ND)
    rate_F = marker_NF.mean(dim=0)[order_F]
    assert sorted(order_F.tolist()) == list(range(24))
    assert bool((rate_F[1:] <= rate_F[:-1]).all())


def test_equal_rates_are_told_apart_by_the_score() -> None:
    """With fewer neurons than are marked every rate is one."""
    ffn, inputs_ND = toy_ffn(num_neurons=6, num_tokens=200)
    marker_NF, order_F = markers(ffn, inputs_ND)
    assert bool((marker_NF == 1).all())
    unit_ND = inputs_ND / inputs_ND.norm(dim=1, keepdim=True)
    gate_FD, up_FD = (rows / rows.norm(dim=1, keepdim=True) for rows in (ffn.gate_FD, ffn.up_FD))
    score_F = (silu(unit_ND @ gate_FD.T) * (unit_ND @ up_FD.T)).abs().mean(dim=0)
    assert order_F.tolist() == score_F.argsort(descending=True).tolist()


def test_the_size_of_inputs_and_rows_does_not_matter() -> None:
    ffn, inputs_ND = toy_ffn(num_tokens=50)
    before, _ = markers(ffn, inputs_ND)
    ffn.gate_FD.mul_(torch.rand(24, 1) + 0.1)
    ffn.up_FD.mul_(7)
    after, _ = markers(ffn, inputs_ND * 3)
    assert torch.equal(before, after)


def test_distances_are_euclidean() -> None:
    generator = torch.Generator().manual_seed(0)
    marker_Nn = (torch.rand(40, 12, generator=generator) > 0.5).float()
    centroid_NR = torch.rand(40, 5, generator=generator)
    expected = torch.cdist(marker_Nn.T, centroid_NR.T)
    torch.testing.assert_close(distances(marker_Nn, centroid_NR), expected, rtol=1e-4, atol=1e-4)
    assert distances(marker_Nn, marker_Nn).diagonal().abs().max() < 1e-2
