"""Ridge rows, trained further on who is among the oracle's K experts: cross-entropy weighted by what is at stake.

An (expert, token) pair weighs sqrt(|norm^2 - threshold^2|), where the threshold is the mean of the token's K-th and
(K+1)-th norm: confusing experts that add the same costs nothing. Likewise a score counts from the mean of the token's
K-th and (K+1)-th score, so there is no intercept to learn and then to drop; on planted rankings this beat an intercept,
on random FFNs it was equal. Descent goes over rows times the Cholesky factor of the moment matrix, in which inputs are
uncorrelated, and starts from scores of a fixed standard deviation: the scale of inputs and of norms does not matter.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from moeify.calibration.regression import cholesky, rank
from moeify.calibration.store import stretches, widened
from moeify.experts.mixing import choose_experts
from moeify.layout import Layout
from moeify.routers import LinearRouter, RoutingTask
from moeify.routers._descent import descend

STEPS = 200
# Of scores at the start; 3 was better than 1.
DEVIATION = 3.0
# Times 1 / sqrt(D), like the parameters. 0.03 to 0.3 gave the same within 0.2 % of the energy kept on random FFNs.
RATE = 0.05


def fit(task: RoutingTask) -> LinearRouter:
    """Just ridge if there is nothing to choose."""
    inputs_TD, layout, share = task.inputs_TD, task.layout, task.share
    before, num_tokens = share.place(len(inputs_TD))
    factor_DD = cholesky(inputs_TD, share, task.ffn.up_FD.device)
    rows_RD = rank(factor_DD, inputs_TD, task.norms_TR, share)
    if layout.num_routed_active == layout.num_routed:
        return LinearRouter(rows_RD)
    device = rows_RD.device
    factor_DD = (factor_DD / math.sqrt(num_tokens)).to(rows_RD.dtype)
    deviation, mean_stake = _scales(task, rows_RD, num_tokens)
    white_RD = rows_RD @ factor_DD * (DEVIATION / deviation)

    def rows() -> Tensor:
        rows_RD: Tensor = torch.linalg.solve_triangular(factor_DD, white_RD, upper=False, left=False)
        return rows_RD

    def loss(batch: Tensor) -> Tensor:
        own = batch[(batch >= before) & (batch < before + len(inputs_TD))].sub(before).to(inputs_TD.device)
        norms_BR = widened(task.norms_TR, own, device)
        # One for the K experts that add most to a token's output.
        member_BR = choose_experts(norms_BR, layout).to(norms_BR.dtype)
        scores_BR = widened(inputs_TD, own, device) @ rows().T
        logits_BR = scores_BR - _threshold(scores_BR.detach(), layout)
        weight_BR = _stakes(norms_BR, layout) / mean_stake
        total = binary_cross_entropy_with_logits(logits_BR, member_BR, weight=weight_BR, reduction="sum")
        return total / (len(batch) * layout.num_routed)

    rate = RATE / math.sqrt(inputs_TD.shape[1])
    descend([white_RD], loss, num_tokens, rate=rate, steps=STEPS, seed=task.seed, share=share)
    return LinearRouter(rows())


def _scales(task: RoutingTask, rows_RD: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Standard deviation of the scores, and mean of the stakes."""
    sums = torch.zeros(3, dtype=torch.float64, device=rows_RD.device)
    for rows in stretches(len(task.inputs_TD)):
        scores_TR = (widened(task.inputs_TD, rows, rows_RD.device) @ rows_RD.T).double()
        stake_TR = _stakes(widened(task.norms_TR, rows, rows_RD.device), task.layout)
        sums += torch.stack([scores_TR.sum(), scores_TR.square().sum(), stake_TR.double().sum()])
    mean, square, stake = task.share.sum(sums) / (num_tokens * task.layout.num_routed)
    tiny = torch.finfo(rows_RD.dtype).tiny
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return deviation.to(rows_RD.dtype).clamp(min=tiny), stake.to(rows_RD.dtype).clamp(min=tiny)


def _stakes(norms_TR: Tensor, layout: Layout) -> Tensor:
    """stake_TR: what confusing an expert with one at the threshold costs."""
    stake_TR: Tensor = (norms_TR.square() - _threshold(norms_TR, layout).square()).abs().sqrt()
    return stake_TR


def _threshold(values_TR: Tensor, layout: Layout) -> Tensor:
    """threshold_T1 between the experts that are chosen and those that are not."""
    count = layout.num_routed_active
    return values_TR.topk(count + 1, dim=1).values[:, count - 1 :].mean(dim=1, keepdim=True)
