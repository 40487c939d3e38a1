"""The ceiling and the static control, against plain loops."""

import pytest
import torch
from conftest import toy_ffn

from moeify.check import baselines as controls
from moeify.check.baselines import NeuronOracle, fit_bias_compensated

SHARES = [0.25, 0.5, 0.75]


@pytest.mark.parametrize("share", SHARES)
def test_the_oracle_is_a_plain_loop(share: float) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=40)
    expected = []
    for input_D in inputs_TD:
        hidden_F = torch.nn.functional.silu(ffn.gate_FD @ input_D) * (ffn.up_FD @ input_D)
        sizes = [abs(float(hidden_F[j])) * float(ffn.down_DF[:, j].norm()) for j in range(ffn.num_neurons)]
        kept = sorted(range(ffn.num_neurons), key=lambda j: -sizes[j])[: round(share * ffn.num_neurons)]
        expected.append(torch.stack([hidden_F[j] * ffn.down_DF[:, j] for j in kept]).sum(dim=0))
    torch.testing.assert_close(NeuronOracle(ffn, share)(inputs_TD), torch.stack(expected))


def test_with_every_neuron_both_are_the_dense_ffn() -> None:
    ffn, inputs_TD = toy_ffn()
    torch.testing.assert_close(NeuronOracle(ffn, 1.0)(inputs_TD), ffn(inputs_TD))
    fitted = fit_bias_compensated(ffn, inputs_TD, 1.0)
    assert not fitted.bias_D.any()
    torch.testing.assert_close(fitted(inputs_TD), ffn(inputs_TD))


@pytest.mark.parametrize("share", SHARES)
def test_no_static_choice_of_the_same_size_comes_nearer(share: float) -> None:
    """Neurons whose columns do not overlap: there the largest contributions are the best choice."""
    ffn, inputs_TD = toy_ffn(num_neurons=16, hidden=16)
    object.__setattr__(ffn, "down_DF", torch.diag(torch.linspace(0.5, 2, 16)))
    dense_TD = ffn(inputs_TD)
    oracle = (NeuronOracle(ffn, share)(inputs_TD) - dense_TD).square().sum(dim=1)
    static = (fit_bias_compensated(ffn, inputs_TD, share)(inputs_TD) - dense_TD).square().sum(dim=1)
    for first in range(16 - round(share * 16)):
        kept = slice(first, first + round(share * 16))
        lost_T = dense_TD.square().sum(dim=1) - dense_TD[:, kept].square().sum(dim=1)
        assert (oracle <= lost_T + 1e-4).all()
    assert oracle.mean() < static.mean()


@pytest.mark.parametrize("share", SHARES)
def test_kept_are_the_neurons_that_fluctuate_most(share: float) -> None:
    ffn, inputs_TD = toy_ffn()
    hidden_TF = ffn.hidden(inputs_TD)
    scores = [
        float(hidden_TF[:, j].var(correction=0)) * float(ffn.down_DF[:, j].square().sum())
        for j in range(ffn.num_neurons)
    ]
    expected = sorted(range(ffn.num_neurons), key=lambda j: -scores[j])[: round(share * ffn.num_neurons)]
    fitted = fit_bias_compensated(ffn, inputs_TD, share)
    assert set(fitted.kept.tolist()) == set(expected)


def test_a_large_neuron_that_never_changes_becomes_bias() -> None:
    ffn, inputs_TD = toy_ffn()
    inputs_TD[:, 0] = 1
    gate_FD, up_FD = ffn.gate_FD.clone(), ffn.up_FD.clone()
    gate_FD[3], up_FD[3] = 0, 0
    gate_FD[3, 0], up_FD[3, 0] = 10, 10
    ffn = type(ffn)(0, gate_FD, up_FD, ffn.down_DF, ffn.activation)
    fitted = fit_bias_compensated(ffn, inputs_TD, 0.9)
    assert 3 not in fitted.kept.tolist()
    assert (fitted.bias_D - 100 * ffn.down_DF[:, 3]).norm() < 0.1 * fitted.bias_D.norm()


@pytest.mark.parametrize("share", SHARES)
def test_the_bias_restores_the_mean_output(share: float) -> None:
    ffn, inputs_TD = toy_ffn()
    fitted = fit_bias_compensated(ffn, inputs_TD, share)
    mean_D = ffn(inputs_TD).mean(dim=0)
    torch.testing.assert_close(fitted(inputs_TD).mean(dim=0), mean_D, atol=1e-5, rtol=1e-4)
    # It is the bias that does it.
    assert ((fitted(inputs_TD) - fitted.bias_D).mean(dim=0) - mean_D).norm() > 0.01
    # On other inputs it is what the calibration inputs gave.
    _, others_TD = toy_ffn(seed=1)
    by_hand_TD = ffn.hidden(others_TD)[:, fitted.kept] @ ffn.down_DF[:, fitted.kept].T + fitted.bias_D
    torch.testing.assert_close(fitted(others_TD), by_hand_TD)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=100)
    oracle, fitted = NeuronOracle(ffn, 0.5)(inputs_TD), fit_bias_compensated(ffn, inputs_TD, 0.5)
    static = fitted(inputs_TD)
    monkeypatch.setattr(controls, "CHUNK_TOKENS", 7)
    again = fit_bias_compensated(ffn, inputs_TD, 0.5)
    assert again.kept.tolist() == fitted.kept.tolist()
    torch.testing.assert_close(again.bias_D, fitted.bias_D)
    torch.testing.assert_close(again(inputs_TD), static)
    torch.testing.assert_close(NeuronOracle(ffn, 0.5)(inputs_TD), oracle)
