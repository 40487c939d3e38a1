"""LLaMA-MoE v2's "Gradient Split Plus" (https://arxiv.org/abs/2411.15708): neurons by what they matter to the loss.

The FFN's inputs are clustered, one cluster of tokens for each routed expert; a neuron's importance to a cluster is the
mean of |h_j * dL/dh_j| over its tokens. Neurons in the top lists of most clusters are shared (the paper's residual
expert), the others go greedily, by the largest importance left, to an expert with room. Clusters of tokens are of
exactly equal size where the authors' may differ by 10 %, so up to R - 1 tokens are left out; neurons in equally many
top lists, where the authors' code goes by index, are taken by mean importance. As in the paper nothing guards massive
activations.

Legend: N sampled tokens, F neurons, R routed experts.
"""

import torch
from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.partition._balanced import balanced_kmeans, label

# Tells the pipeline to measure the loss's gradient by the FFN's output.
GRADIENT = True


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:
    """labels_F; see the package for the contract."""
    if layout.num_routed == 0:
        return label(ffn.num_neurons, torch.arange(0), torch.arange(0))
    width = layout.expert_width(ffn.num_neurons)
    importance_RF = _importance(ffn, stats, layout.num_routed, seed)
    routed = _without_residual(importance_RF, layout.num_shared * width, width)
    return label(ffn.num_neurons, routed, _greedy(importance_RF[:, routed], width))


def _importance(ffn: FFNWeights, stats: ActivationStats, num_clusters: int, seed: int) -> Tensor:
    """importance_RF of every neuron to every cluster of tokens."""
    if stats.gradient_ND is None:
        raise ValueError("the gradient partition needs gradients")
    num_tokens = len(stats.inputs_ND) - len(stats.inputs_ND) % num_clusters
    inputs_ND = stats.inputs_ND[:num_tokens]
    effect_NF = ffn.hidden(inputs_ND).mul_(stats.gradient_ND[:num_tokens].to(ffn.down_DF) @ ffn.down_DF).abs_()
    clusters_N = balanced_kmeans(inputs_ND, num_clusters, seed=seed).to(effect_NF.device)
    return torch.stack([effect_NF[clusters_N == cluster].mean(dim=0) for cluster in range(num_clusters)])


def _without_residual(importance_RF: Tensor, count: int, width: int) -> Tensor:
    """Ascending indices of what is left when the neurons in the top lists of most clusters are taken, `count` in all.

    Lists are drawn up anew, `width` long, when those in most of them are gone.
    """
    left = torch.arange(importance_RF.shape[1], device=importance_RF.device)
    by_mean = importance_RF.mean(dim=0)
    while count > 0:
        lists = importance_RF[:, left].topk(width, dim=1).indices
        votes = torch.bincount(lists.flatten(), minlength=len(left))
        most = (votes == votes.max()).nonzero().squeeze(1)
        taken = most[by_mean[left[most]].argsort(descending=True, stable=True)[:count]]
        is_left = torch.ones_like(left, dtype=torch.bool)
        is_left[taken] = False
        left = left[is_left]
        count -= len(taken)
    return left


def _greedy(importance_Rn: Tensor, width: int) -> Tensor:
    """Expert of each of the n neurons: the largest importance that is left decides, among experts with room."""
    num_experts, num_neurons = importance_Rn.shape
    room = [width] * num_experts
    experts = [-1] * num_neurons
    for place in importance_Rn.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(place, num_neurons)
        if room[expert] and experts[neuron] < 0:
            experts[neuron] = expert
            room[expert] -= 1
    return torch.tensor(experts)
