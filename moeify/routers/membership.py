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
from moeify.experts.mixing import choose_experts
from moeify.plan import Layout
from moeify.routers import LinearRouter, RoutingTask
from moeify.routers._descent import descend

STEPS = 200
# Of scores at the start; 3 was better than 1.
DEVIATION = 3.0
# Times 1 / sqrt(D), like the parameters. 0.03 to 0.3 gave the same within 0.2 % of the energy kept on random FFNs.
RATE = 0.05


def fit(task: RoutingTask) -> LinearRouter:
    """Just ridge if there is nothing to choose."""
    inputs_TD, layout = task.inputs_TD, task.layout
    num_tokens, hidden_size = inputs_TD.shape
    factor_DD = cholesky(inputs_TD)
    rows_RD = rank(factor_DD, inputs_TD, task.norms_TR)
    if layout.num_routed_active == layout.num_routed:
        return LinearRouter(rows_RD)
    factor_DD = (factor_DD / math.sqrt(num_tokens)).to(inputs_TD.dtype)
    deviation = (inputs_TD @ rows_RD.T).std().clamp(min=torch.finfo(rows_RD.dtype).tiny)
    white_RD = rows_RD @ factor_DD * (DEVIATION / deviation)
    # One for the K experts that add most to a token's output.
    member_TR = choose_experts(task.norms_TR, layout).to(inputs_TD.dtype)
    stake_TR = _stakes(task)

    def rows() -> Tensor:
        rows_RD: Tensor = torch.linalg.solve_triangular(factor_DD, white_RD, upper=False, left=False)
        return rows_RD

    def loss(batch: Tensor) -> Tensor:
        scores_BR = inputs_TD[batch] @ rows().T
        logits_BR = scores_BR - _threshold(scores_BR.detach(), layout)
        return binary_cross_entropy_with_logits(logits_BR, member_TR[batch], weight=stake_TR[batch])

    rate = RATE / math.sqrt(hidden_size)
    descend([white_RD], loss, num_tokens, rate=rate, steps=STEPS, seed=task.seed)
    return LinearRouter(rows())


def _stakes(task: RoutingTask) -> Tensor:
    """stake_TR with a mean of one, in the dtype of the inputs."""
    stake_TR = (task.norms_TR.square() - _threshold(task.norms_TR, task.layout).square()).abs().sqrt()
    return (stake_TR / stake_TR.mean().clamp(min=torch.finfo(stake_TR.dtype).tiny)).to(task.inputs_TD.dtype)


def _threshold(values_TR: Tensor, layout: Layout) -> Tensor:
    """threshold_T1 between the experts that are chosen and those that are not."""
    count = layout.num_routed_active
    return values_TR.topk(count + 1, dim=1).values[:, count - 1 :].mean(dim=1, keepdim=True)
