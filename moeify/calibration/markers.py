"""CMoE's activation markers (https://arxiv.org/abs/2502.04416v3): who is among a token's ten most active neurons.

Scores are those of the authors' code, which the paper does not spell out: inputs and weight rows have unit length.
Where the two differ otherwise the paper is followed: distances between markers are L2, the code's are L1. Neurons that
are marked equally often, on which both are silent, are ranked by their mean score.

Legend: N sampled tokens, F neurons, R routed experts, n routed neurons.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moeify.models.ffn import FFNWeights

# K_a of the paper.
MARKED_NEURONS = 10


def markers(ffn: FFNWeights, inputs_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(marker_NF of zeros and ones, neurons by falling activation rate)."""
    unit = unit_rows(ffn)
    score_NF = unit.hidden(normalize(inputs_ND, dim=1)).abs()
    marked = score_NF.topk(min(MARKED_NEURONS, ffn.num_neurons), dim=1).indices
    marker_NF = torch.zeros_like(score_NF).scatter_(1, marked, 1.0)
    by_score_F = score_NF.mean(dim=0).argsort(descending=True, stable=True)
    by_rate_F = marker_NF.sum(dim=0)[by_score_F].argsort(descending=True, stable=True)
    return marker_NF, by_score_F[by_rate_F]


def distances(marker_Nn: Tensor, centroid_NR: Tensor) -> Tensor:
    """L2 distance between every marker and every centroid."""
    product_nR = marker_Nn.T @ centroid_NR
    square_nR = marker_Nn.square().sum(dim=0)[:, None] - 2 * product_nR + centroid_NR.square().sum(dim=0)
    return square_nR.clamp(min=0).sqrt()


def unit_rows(ffn: FFNWeights) -> FFNWeights:
    """The FFN with every row into its inner width scaled to length one."""
    gate_FD = None if ffn.gate_FD is None else normalize(ffn.gate_FD, dim=1)
    return replace(ffn, gate_FD=gate_FD, up_FD=normalize(ffn.up_FD, dim=1))
