"""What a converted FFN is compared with and no checkpoint holds: the ceiling, and a published static control.

Legend: T tokens, D hidden size, F neurons, n of them kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.models.ffn import CHUNK_TOKENS, FFNWeights


@dataclass(frozen=True)
class NeuronOracle:
    """Keeps, for each token, the share of neurons that contribute most: the ceiling of every method that drops some."""

    ffn: FFNWeights
    share: float

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        column_norm_F = self.ffn.down_DF.norm(dim=0)
        count = round(self.share * self.ffn.num_neurons)
        outputs = []
        for chunk_TD in inputs_TD.split(CHUNK_TOKENS):
            hidden_TF = self.ffn.hidden(chunk_TD)
            kept = (hidden_TF.abs() * column_norm_F).topk(count, dim=1).indices
            outputs.append(
                torch.zeros_like(hidden_TF).scatter_(1, kept, hidden_TF.gather(1, kept)) @ self.ffn.down_DF.T
            )
        return torch.cat(outputs)


@dataclass(frozen=True)
class BiasCompensated:
    """Static pruning as in FLAP (https://arxiv.org/abs/2312.11983), of the FFN alone and the same share in each layer.

    Kept are the neurons whose input to down_proj fluctuates most, weighted by the squared norm of their column; the
    mean of what is dropped becomes a bias.
    """

    ffn: FFNWeights
    kept: Tensor
    bias_D: Tensor

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        down_nD = self.ffn.down_DF[:, self.kept].T
        outputs = [self.ffn.hidden(chunk_TD)[:, self.kept] @ down_nD for chunk_TD in inputs_TD.split(CHUNK_TOKENS)]
        return torch.cat(outputs) + self.bias_D


def fit_bias_compensated(ffn: FFNWeights, inputs_TD: Tensor, share: float) -> BiasCompensated:
    """Choose and compensate on calibration inputs."""
    total_F = squares_F = torch.zeros(ffn.num_neurons, device=inputs_TD.device, dtype=torch.float64)
    for chunk_TD in inputs_TD.split(CHUNK_TOKENS):
        hidden_TF = ffn.hidden(chunk_TD).double()
        total_F, squares_F = total_F + hidden_TF.sum(0), squares_F + hidden_TF.square().sum(0)
    mean_F = total_F / len(inputs_TD)
    fluctuation_F = (squares_F / len(inputs_TD) - mean_F.square()) * ffn.down_DF.double().square().sum(dim=0)
    order = fluctuation_F.argsort(descending=True)
    count = round(share * ffn.num_neurons)
    dropped = order[count:]
    bias_D = ffn.down_DF[:, dropped] @ mean_F[dropped].to(ffn.down_DF)
    return BiasCompensated(ffn, order[:count], bias_D)
