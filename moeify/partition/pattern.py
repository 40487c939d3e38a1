"""Neurons that are kept for the same tokens: clusters of binary keep patterns.

A token keeps the neurons with the largest contributions, as many as the layout lets it run; ResMoE groups neurons by
such patterns. They are as CMoE's markers (https://arxiv.org/abs/2502.04416) are, but by contribution and for the whole
budget rather than for ten neurons. Patterns are not scaled, so how often a neuron is kept counts too. If all experts
are active all patterns are alike, and the clusters mean nothing.
"""

import torch
from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.models.ffn import FFNWeights
from moeify.partition._balanced import balanced_kmeans, label, label_in_turn, split_off_shared
from moeify.partition._features import principal
from moeify.plan import Layout


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:
    """labels_F; see the package for the contract."""
    routed = split_off_shared(stats, layout)
    if layout.num_routed <= 1 or layout.is_static:
        return label_in_turn(ffn.num_neurons, routed, layout)
    budget = layout.num_active * layout.expert_width(ffn.num_neurons)
    kept = stats.contribution_NF.abs().topk(budget, dim=1).indices
    pattern_NF = torch.zeros_like(stats.contribution_NF).scatter_(1, kept, 1.0)
    pattern_nN = pattern_NF[:, routed].T
    features = principal(pattern_nN - pattern_nN.mean(dim=0), seed=seed)
    return label(ffn.num_neurons, routed, balanced_kmeans(features, layout.num_routed, seed=seed))
