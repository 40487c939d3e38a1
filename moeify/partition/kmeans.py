"""Balanced k-means of the gate_proj rows, as in MoEfication (https://arxiv.org/abs/2110.01786) and LLaMA-MoE.

Rows are scaled to unit length. With shared experts their neurons are taken by mean energy first.
"""

from torch import Tensor
from torch.nn.functional import normalize

from moeify.calibration.activations import ActivationStats
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.partition._balanced import balanced_kmeans, label, split_off_shared


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:
    """labels_F; see the package for the contract."""
    routed = split_off_shared(stats, layout)
    rows = normalize(ffn.directions_FD[routed].float(), dim=1)
    return label(ffn.num_neurons, routed, balanced_kmeans(rows, layout.num_routed, seed=seed))
