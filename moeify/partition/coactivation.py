"""Neurons that contribute to the same tokens: MoEfication's co-activation graph (https://arxiv.org/abs/2110.01786).

The paper counts how often two ReLU neurons fire together and cuts the graph with METIS. Gated FFNs hardly have zeros,
so an edge here is the cosine between the sizes of two neurons' contributions on the sampled tokens; and the normalised
cut is relaxed as in spectral clustering (Ng, Jordan and Weiss, 2001): one leading eigenvector an expert, rows of unit
length, then balanced k-means. Shared neurons, which the paper has none of, are taken by mean energy first.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moeify.calibration.activations import ActivationStats
from moeify.models.ffn import FFNWeights
from moeify.partition._balanced import balanced_kmeans, label, label_in_turn, split_off_shared
from moeify.plan import Layout


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:
    """labels_F; see the package for the contract."""
    routed = split_off_shared(stats, layout)
    if layout.num_routed <= 1 or layout.is_static:
        return label_in_turn(ffn.num_neurons, routed, layout)
    embedding = _spectral(stats.contribution_NF[:, routed].abs(), layout.num_routed, seed)
    return label(ffn.num_neurons, routed, balanced_kmeans(embedding, layout.num_routed, seed=seed))


def _spectral(size_Nn: Tensor, dimensions: int, seed: int) -> Tensor:
    """Leading eigenvectors of the graph's normalised affinity, one row for each of the n neurons."""
    from sklearn.utils.extmath import randomized_svd

    unit_Nn = normalize(size_Nn, dim=0)
    degree_n = unit_Nn.T @ unit_Nn.sum(dim=1)
    scaled_Nn = unit_Nn / degree_n.clamp(min=torch.finfo(degree_n.dtype).tiny).sqrt()
    # The affinity is unit' unit, so its eigenvectors are singular vectors and the n x n graph is never built.
    vectors = randomized_svd(scaled_Nn.cpu().numpy(), min(dimensions, *size_Nn.shape), random_state=seed)[2]
    return normalize(torch.from_numpy(vectors.copy()).T, dim=1)
