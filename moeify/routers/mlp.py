"""A two-layer network that regresses the experts' output norms, as D2DMoE's (https://arxiv.org/abs/2310.04361).

Its width is that of the paper, and of order of MoEfication's (https://arxiv.org/abs/2110.01786), which predicts sums of
activations instead. Norms are taken less the token's mean over experts and on a common scale, because only their
ranking counts; inputs are scaled to a mean square of one in each feature.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from moeify.routers import LinearRouter, RoutingTask
from moeify.routers._descent import descend

# One of them is constant: its column holds the biases of the scores.
WIDTH = 128
STEPS = 600
RATE = 3e-3


def fit(task: RoutingTask) -> LinearRouter:
    """Least squares by AdamW."""
    inputs_TD = task.inputs_TD
    num_tokens, hidden_size = inputs_TD.shape
    tiny = torch.finfo(inputs_TD.dtype).tiny
    # Where the number of experts is a token's own, the mean says how much the token needs.
    mean_T1 = 0 if task.layout.is_adaptive else task.norms_TR.mean(dim=1, keepdim=True)
    target_TR = (task.norms_TR - mean_T1).to(inputs_TD.dtype)
    target_TR /= target_TR.square().mean().sqrt().clamp(min=tiny)
    scale_D = inputs_TD.square().mean(dim=0).sqrt()
    # A feature that is always zero needs no scale, and must not get an infinite one.
    scale_D = torch.where(scale_D > 0, scale_D, 1)
    generator = torch.Generator().manual_seed(task.seed)

    def noise(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(inputs_TD) / math.sqrt(columns)

    units_HD, rows_RH = noise(WIDTH - 1, hidden_size), noise(task.layout.num_routed, WIDTH - 1)
    unit_bias_H1, row_bias_R1 = inputs_TD.new_zeros(WIDTH - 1, 1), inputs_TD.new_zeros(len(rows_RH), 1)

    def loss(batch: Tensor) -> Tensor:
        network = LinearRouter(torch.cat([rows_RH, row_bias_R1], 1), _with_constant(units_HD, unit_bias_H1))
        return mse_loss(network(inputs_TD[batch] / scale_D), target_TR[batch])

    descend([units_HD, unit_bias_H1, rows_RH, row_bias_R1], loss, num_tokens, rate=RATE, steps=STEPS, seed=task.seed)
    return LinearRouter(torch.cat([rows_RH, row_bias_R1], 1), _with_constant(units_HD / scale_D, unit_bias_H1))


def _with_constant(units_HD: Tensor, bias_H1: Tensor) -> Tensor:
    """Units with their biases behind them, and one that is always one."""
    constant_1C = torch.cat([units_HD.new_zeros(1, units_HD.shape[1]), units_HD.new_ones(1, 1)], 1)
    return torch.cat([torch.cat([units_HD, bias_H1], 1), constant_1C])
