"""A two-layer network that regresses the experts' output norms, as D2DMoE's (https://arxiv.org/abs/2310.04361).

Its width is that of the paper, and of order of MoEfication's (https://arxiv.org/abs/2110.01786), which predicts sums of
activations instead. Norms are taken less the token's mean over experts and on a common scale, because only their
ranking counts; inputs are scaled to a mean square of one in each feature.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, relu

from moeify.routers import RoutingTask
from moeify.routers._descent import descend

LINEAR = False
WIDTH = 128
STEPS = 600
RATE = 3e-3


@dataclass(frozen=True)
class MLPRouter:
    """scores = second relu(first x + first_bias) + second_bias, H hidden units."""

    first_HD: Tensor
    first_bias_H: Tensor
    second_RH: Tensor
    second_bias_R: Tensor

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        hidden_TH = relu(inputs_TD @ self.first_HD.to(inputs_TD).T + self.first_bias_H.to(inputs_TD))
        return hidden_TH @ self.second_RH.to(inputs_TD).T + self.second_bias_R.to(inputs_TD)


def fit(task: RoutingTask) -> MLPRouter:
    """Least squares by AdamW."""
    inputs_TD = task.inputs_TD
    num_tokens, hidden_size = inputs_TD.shape
    tiny = torch.finfo(inputs_TD.dtype).tiny
    target_TR = (task.norms_TR - task.norms_TR.mean(dim=1, keepdim=True)).to(inputs_TD.dtype)
    target_TR /= target_TR.square().mean().sqrt().clamp(min=tiny)
    scale_D = inputs_TD.square().mean(dim=0).sqrt()
    # A feature that is always zero needs no scale, and must not get an infinite one.
    scale_D = torch.where(scale_D > 0, scale_D, 1)
    generator = torch.Generator().manual_seed(task.seed)

    def noise(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(inputs_TD) / math.sqrt(columns)

    network = MLPRouter(
        noise(WIDTH, hidden_size),
        inputs_TD.new_zeros(WIDTH),
        noise(task.layout.num_routed, WIDTH),
        inputs_TD.new_zeros(task.layout.num_routed),
    )

    def loss(batch: Tensor) -> Tensor:
        return mse_loss(network(inputs_TD[batch] / scale_D), target_TR[batch])

    parameters = [network.first_HD, network.first_bias_H, network.second_RH, network.second_bias_R]
    descend(parameters, loss, num_tokens, rate=RATE, steps=STEPS, seed=task.seed)
    return MLPRouter(network.first_HD / scale_D, *parameters[1:])
