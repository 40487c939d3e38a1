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

from moeify.calibration.activations import Activations
from moeify.calibration.share import ALONE, Share
from moeify.calibration.store import widened

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
        error_of_half: the same after a fit to half as many tokens.
    """

    down_DF: Tensor
    strength: float
    error_before: float
    error_after: float
    error_of_half: float

    @property
    def error_of_twice(self) -> float:
        """Expected of a fit to twice as many tokens: what a fit of noise costs falls with their number."""
        return self.error_after - (self.error_of_half - self.error_after) / 2


def refit(
    activations: Activations,
    outputs_TD: Tensor,
    down_DF: Tensor,
    weight_T: Tensor,
    *,
    seed: int,
    less_D: Tensor | None = None,
    share: Share = ALONE,
) -> Refit:
    """Fit down_proj to the dense outputs under the activations' mask.

    Args:
        activations: masked activations, F columns.
        outputs_TD: what the dense FFN gives for the same tokens.
        down_DF: the dense columns of these neurons.
        weight_T: weight of each token's error.
        seed: of the random projection.
        less_D: a bias of down_proj, which is part of the outputs and stays as it is.
        share: whose tokens these are.
    """
    num_hidden = outputs_TD.shape[1]
    before, num_tokens = share.place(activations.num_tokens)
    boundary = round(num_tokens * (1 - HELD_OUT_SHARE))
    columns = min(SKETCH_COLUMNS, num_hidden)
    sketch_DS = torch.randn(num_hidden, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    system: _Primal | _Dual
    # Rows of other processes are not here, sums over them are.
    if num_tokens < down_DF.shape[1] and share.size == 1:
        system = _Dual(down_DF, num_tokens, boundary, sketch_DS.to(down_DF))
    else:
        system = _Primal(down_DF, boundary, sketch_DS.to(down_DF))
    errors = torch.zeros(2, dtype=torch.float64)
    for rows, hidden_TF in activations.chunks():
        weight_T1 = weight_T[rows, None]
        target_TD = widened(outputs_TD, rows, down_DF.device)
        target_TD = (target_TD if less_D is None else target_TD - less_D) * weight_T1
        used_TF = hidden_TF * weight_T1
        residual_TD = target_TD - used_TF @ down_DF.T
        system.add(before + rows.start, used_TF, residual_TD)
        held_out = slice(max(boundary - before - rows.start, 0), None)
        errors += torch.stack([part[held_out].square().sum() for part in (residual_TD, target_TD)]).cpu()
    error, energy = share.sum(errors).tolist()
    system.finish(share)
    if energy == 0:
        return Refit(down_DF, STRENGTHS[START], 0.0, 0.0, 0.0)
    return share.first(lambda: _solved(system, down_DF, error, energy))


def _solved(system: "_Primal | _Dual", down_DF: Tensor, error: float, energy: float) -> Refit:
    best = _best(system)
    # Fewer tokens may need more.
    best_of_half = _best(system, best, half=True)
    # All columns, now that it need not be computed for every strength: a sketch can claim more than there is to gain.
    gain = system.gain(STRENGTHS[best], exact=True)
    gain_of_half = system.gain(STRENGTHS[best_of_half], exact=True, half=True)
    return Refit(
        down_DF + system.solve(STRENGTHS[best]),
        STRENGTHS[best],
        error / energy,
        (error - gain) / energy,
        (error - gain_of_half) / energy,
    )


def _best(system: "_Primal | _Dual", start: int = START, *, half: bool = False) -> int:
    """Walk along STRENGTHS from this one while the held-out error falls."""
    best, best_gain = start, system.gain(STRENGTHS[start], half=half)
    for direction in (1, -1):
        while (
            0 <= best + direction < len(STRENGTHS)
            and (further := system.gain(STRENGTHS[best + direction], half=half)) > best_gain
        ):
            best, best_gain = best + direction, further
        if best != start:
            break
    return best


class _Primal:
    """Normal equations of size F, for more tokens than neurons; summed up chunk by chunk."""

    def __init__(self, down_DF: Tensor, boundary: int, sketch_DS: Tensor) -> None:
        self._boundary, self._sketch_DS = boundary, sketch_DS
        num_hidden, num_neurons = down_DF.shape
        self._fit_FF, self._held_FF = (down_DF.new_zeros(num_neurons, num_neurons) for _ in range(2))
        self._fit_FD, self._held_FD = (down_DF.new_zeros(num_neurons, num_hidden) for _ in range(2))
        self._half: tuple[Tensor, Tensor] | None = None

    def add(self, start: int, used_TF: Tensor, residual_TD: Tensor) -> None:
        if self._half is None and start + used_TF.shape[0] >= self._boundary // 2:
            self._half = (self._fit_FF.clone(), self._fit_FD.clone())
            self._add(*self._half, used_TF, residual_TD, slice(0, max(self._boundary // 2 - start, 0)))
        cut = min(max(self._boundary - start, 0), used_TF.shape[0])
        self._add(self._fit_FF, self._fit_FD, used_TF, residual_TD, slice(0, cut))
        self._add(self._held_FF, self._held_FD, used_TF, residual_TD, slice(cut, None))

    @staticmethod
    def _add(gram_FF: Tensor, moment_FD: Tensor, used_TF: Tensor, residual_TD: Tensor, part: slice) -> None:
        _add_gram(gram_FF, used_TF[part])
        moment_FD.addmm_(used_TF[part].T, residual_TD[part])

    def finish(self, share: Share) -> None:
        self._half = self._half or (self._fit_FF.clone(), self._fit_FD.clone())
        for gram_FF, moment_FD in ((self._fit_FF, self._fit_FD), (self._held_FF, self._held_FD), self._half):
            share.sum(gram_FF)
            share.sum(moment_FD)
            gram_FF.triu_().add_(gram_FF.triu(1).T)

    def gain(self, strength: float, *, exact: bool = False, half: bool = False) -> float:
        assert self._half is not None
        gram_FF, moment_FD = self._half if half else (self._fit_FF, self._fit_FD)
        fit_FS = moment_FD if exact else moment_FD @ self._sketch_DS
        delta_FS = _solve(gram_FF, fit_FS, strength * gram_FF.diagonal().mean())
        check_FS = self._held_FD if exact else self._held_FD @ self._sketch_DS
        return float((delta_FS * (2 * check_FS - self._held_FF @ delta_FS)).sum())

    def solve(self, strength: float) -> Tensor:
        """delta_DF from all tokens; the parts are summed in place, so this comes last."""
        self._fit_FF += self._held_FF
        self._fit_FD += self._held_FD
        return _solve(self._fit_FF, self._fit_FD, strength * self._fit_FF.diagonal().mean()).T


class _Dual:
    """The same fit as a system of size T, for fewer tokens than neurons: dW' = H~'(H~H~' + ...)^-1 R."""

    def __init__(self, down_DF: Tensor, num_tokens: int, boundary: int, sketch_DS: Tensor) -> None:
        self._boundary, self._sketch_DS = boundary, sketch_DS
        num_hidden, num_neurons = down_DF.shape
        self._used_TF = down_DF.new_empty(num_tokens, num_neurons)
        self._residual_TD = down_DF.new_empty(num_tokens, num_hidden)
        self._gram_TT = down_DF.new_empty(0)

    def add(self, start: int, used_TF: Tensor, residual_TD: Tensor) -> None:
        self._used_TF[start : start + used_TF.shape[0]] = used_TF
        self._residual_TD[start : start + used_TF.shape[0]] = residual_TD

    def finish(self, share: Share) -> None:
        assert share.size == 1
        self._gram_TT = self._used_TF @ self._used_TF.T

    def gain(self, strength: float, *, exact: bool = False, half: bool = False) -> float:
        fit, held = slice(0, self._boundary // 2 if half else self._boundary), slice(self._boundary, None)
        target_TS = self._residual_TD if exact else self._residual_TD @ self._sketch_DS
        weights_TS = _solve(self._gram_TT[fit, fit], target_TS[fit], strength * self._mean_diagonal(fit))
        found_TS = self._gram_TT[held, fit] @ weights_TS
        return float((found_TS * (2 * target_TS[held] - found_TS)).sum())

    def solve(self, strength: float) -> Tensor:
        """delta_DF from all tokens."""
        every = slice(0, None)
        weights_TD = _solve(self._gram_TT, self._residual_TD, strength * self._mean_diagonal(every))
        return weights_TD.T @ self._used_TF

    def _mean_diagonal(self, part: slice) -> Tensor:
        """Mean diagonal of the F x F matrix, which has the same trace."""
        return self._gram_TT.diagonal()[part].sum() / self._used_TF.shape[1]


def _add_gram(gram_FF: Tensor, hidden_TF: Tensor, blocks: int = 4) -> None:
    """gram += H'H on and above the diagonal blocks only, which saves three eighths of the work."""
    step = -(-gram_FF.shape[0] // blocks)
    for start in range(0, gram_FF.shape[0], step):
        columns = hidden_TF[:, start : start + step]
        gram_FF[start : start + step, start:].addmm_(columns.T, hidden_TF[:, start:])


def _solve(gram: Tensor, moment: Tensor, damping: Tensor) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(damping)
    return torch.cholesky_solve(moment, torch.linalg.cholesky(damped))
