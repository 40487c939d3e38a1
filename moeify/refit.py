"""Closed-form compensation: change down_proj so that the kept neurons also stand in for those a token does not use.

Legend: T tokens, D hidden size, F neurons that can be active, S sketch columns.

With H~ the activations after routing, R what the dense FFN outputs beyond W H~, and every token weighted:

    dW' = (H~'H~ + strength * mean diag(H~'H~) * I)^-1 H~'R

The strength is chosen on tokens held out from the fit, because the best one depends on how many tokens there are
(SmolLM2-135M, 16k tokens, 75 % active: 0.02 gives 9 % more layer error on other corpora than 0.3). R stays fixed while
strengths are compared, so a random projection of its D columns to S ranks them as well as all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.activations import Activations

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
START = STRENGTHS.index(0.3)
HELD_OUT_SHARE = 1 / 8
SKETCH_COLUMNS = 64


@dataclass(frozen=True)
class Refit:
    """A refit down_proj and what it was worth on held-out calibration tokens.

    Args:
        down_DF: columns in the order of the activations.
        strength: the chosen regularisation.
        error_before, error_after: squared error of the FFN output relative to the dense output, held-out tokens.
    """

    down_DF: Tensor
    strength: float
    error_before: float
    error_after: float


@dataclass
class _Moments:
    """Sums over one part of the tokens."""

    gram_FF: Tensor
    cross_FD: Tensor
    residual: float = 0.0
    energy: float = 0.0

    def add(self, hidden_TF: Tensor, residual_TD: Tensor, outputs_TD: Tensor) -> None:
        add_gram(self.gram_FF, hidden_TF)
        self.cross_FD.addmm_(hidden_TF.T, residual_TD)
        self.residual += float(residual_TD.square().sum())
        self.energy += float(outputs_TD.square().sum())


def add_gram(gram_FF: Tensor, hidden_TF: Tensor, blocks: int = 4) -> None:
    """gram += H'H on and above the diagonal blocks only; `_symmetric` mirrors them once at the end."""
    step = -(-gram_FF.shape[0] // blocks)
    for start in range(0, gram_FF.shape[0], step):
        columns = hidden_TF[:, start : start + step]
        gram_FF[start : start + step, start:].addmm_(columns.T, hidden_TF[:, start:])


def _symmetric(gram_FF: Tensor) -> Tensor:
    return gram_FF.triu_().add_(gram_FF.triu(1).T)


def refit(activations: Activations, outputs_TD: Tensor, down_DF: Tensor, weight_T: Tensor, *, seed: int) -> Refit:
    """Fit down_proj to the dense outputs under the activations' mask.

    Args:
        activations: masked activations, F columns.
        outputs_TD: what the dense FFN gives for the same tokens.
        down_DF: the dense columns of these neurons.
        weight_T: weight of each token's error.
        seed: of the random projection.
    """
    num_hidden, num_neurons = down_DF.shape
    fitted, held_out = (
        _Moments(down_DF.new_zeros(num_neurons, num_neurons), down_DF.new_zeros(num_neurons, num_hidden))
        for _ in range(2)
    )
    boundary = round(outputs_TD.shape[0] * (1 - HELD_OUT_SHARE))
    for rows, hidden_TF in activations.chunks():
        cut = min(max(boundary - rows.start, 0), hidden_TF.shape[0])
        for moments, part in ((fitted, slice(0, cut)), (held_out, slice(cut, None))):
            weight_T1 = weight_T[rows][part, None]
            target_TD = outputs_TD[rows][part] * weight_T1
            used_TF = hidden_TF[part] * weight_T1
            moments.add(used_TF, target_TD - used_TF @ down_DF.T, target_TD)
    for moments in (fitted, held_out):
        _symmetric(moments.gram_FF)
    strength, gain = _choose_strength(fitted, held_out, seed=seed)
    fitted.gram_FF += held_out.gram_FF
    fitted.cross_FD += held_out.cross_FD
    return Refit(
        down_DF=down_DF + _solve(fitted.gram_FF, fitted.cross_FD, strength).T,
        strength=strength,
        error_before=held_out.residual / held_out.energy,
        error_after=(held_out.residual - gain) / held_out.energy,
    )


def _choose_strength(fitted: _Moments, held_out: _Moments, *, seed: int) -> tuple[float, float]:
    """Walk along STRENGTHS from START while the held-out error falls; returns the best and what it gains."""
    generator = torch.Generator().manual_seed(seed)
    num_hidden = fitted.cross_FD.shape[1]
    columns = min(SKETCH_COLUMNS, num_hidden)
    sketch_DS = torch.randn(num_hidden, columns, generator=generator).to(fitted.cross_FD) / columns**0.5
    fit_FS, check_FS = fitted.cross_FD @ sketch_DS, held_out.cross_FD @ sketch_DS

    def gain(index: int) -> float:
        delta_FS = _solve(fitted.gram_FF, fit_FS, STRENGTHS[index])
        return float((delta_FS * (2 * check_FS - held_out.gram_FF @ delta_FS)).sum())

    best, best_gain = START, gain(START)
    for direction in (1, -1):
        while 0 <= best + direction < len(STRENGTHS) and (further := gain(best + direction)) > best_gain:
            best, best_gain = best + direction, further
        if best != START:
            break
    return STRENGTHS[best], best_gain


def _solve(gram_FF: Tensor, moment_FS: Tensor, strength: float) -> Tensor:
    damped_FF = gram_FF.clone()
    damped_FF.diagonal().add_(strength * gram_FF.diagonal().mean())
    return torch.cholesky_solve(moment_FS, torch.linalg.cholesky(damped_FF))
