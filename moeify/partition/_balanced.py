"""Pieces that several partitions share: always-on neurons by energy, and k-means with clusters of equal size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.layout import Layout
from moeify.plan import SHARED

MAX_ROUNDS = 10


def shared_by_energy(stats: ActivationStats, count: int) -> Tensor:
    """Ascending indices of the `count` neurons that are always on: massive ones first, then by mean energy."""
    rank_F = torch.where(stats.massive_F, torch.inf, stats.energy_F)
    return rank_F.argsort(descending=True, stable=True)[:count].sort().values


def label(num_neurons: int, routed: Tensor, clusters: Tensor) -> Tensor:
    """labels_F from the routed neurons' indices and their cluster numbers; all others are shared."""
    labels_F = torch.full((num_neurons,), SHARED, dtype=torch.int16)
    labels_F[routed.cpu()] = clusters.to("cpu", torch.int16)
    return labels_F


def label_in_turn(num_neurons: int, routed: Tensor, layout: Layout) -> Tensor:
    """labels_F where it does not matter who goes where: nothing is routed, or all goes to one expert."""
    return label(num_neurons, routed, torch.arange(len(routed)) % max(1, layout.num_routed))


def split_off_shared(stats: ActivationStats, layout: Layout) -> Tensor:
    """Indices of the neurons that are left to be routed, by falling energy, so that storage order decides nothing."""
    num_neurons = stats.energy_F.numel()
    is_routed_F = torch.ones(num_neurons, dtype=torch.bool, device=stats.energy_F.device)
    is_routed_F[shared_by_energy(stats, layout.num_shared * layout.expert_width(num_neurons))] = False
    routed = is_routed_F.nonzero().squeeze(1)
    return routed[stats.energy_F[routed].argsort(descending=True, stable=True)]


def transport(cost_NR: Tensor, capacity_R: Sequence[int] | None = None) -> Tensor:
    """int64 cluster of each point at the least total cost, every cluster full.

    Args:
        cost_NR: of putting a point into a cluster.
        capacity_R: points in each cluster, N together; None is equally many, R divides N.
    """
    import ot

    num_points, num_clusters = cost_NR.shape
    demand = np.full(num_clusters, num_points / num_clusters) if capacity_R is None else np.array(capacity_R, float)
    # Unit masses keep the transport plan integral, so that no point is split between clusters.
    cost = np.ascontiguousarray(cost_NR.double().cpu().numpy())
    return torch.from_numpy(ot.emd(np.ones(num_points), demand, cost, numItermax=10_000_000).argmax(axis=1))


def balanced_kmeans(features_NP: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """k-means whose assignment step is an exact transport problem with equal capacities.

    Args:
        features_NP: N points in P dimensions; num_clusters divides N.
        num_clusters: clusters of N / num_clusters points each.
        seed: of the k-means++ start.

    Returns:
        int64 cluster of each point.
    """
    from sklearn.cluster import kmeans_plusplus

    if num_clusters == 0:
        return torch.empty(0, dtype=torch.int64)
    points = features_NP.float().cpu()
    centroids = torch.from_numpy(kmeans_plusplus(points.numpy(), num_clusters, random_state=seed)[0])
    labels = torch.full((points.shape[0],), -1)
    for _ in range(MAX_ROUNDS):
        cost = points.square().sum(1, keepdim=True) - 2 * points @ centroids.T + centroids.square().sum(1)
        previous, labels = labels, transport(cost)
        if torch.equal(previous, labels):
            break
        centroids = torch.stack([points[labels == cluster].mean(0) for cluster in range(num_clusters)])
    return labels
