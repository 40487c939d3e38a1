"""ExpertWeaver's router (https://arxiv.org/abs/2602.15521): a row is the mean of the expert's gate_proj rows."""

import torch

from moeify.routers import LinearRouter, RoutingTask


def fit(task: RoutingTask) -> LinearRouter:
    """Nothing is learned from norms_TR; rows are not scaled."""
    gate_FD = task.ffn.directions_FD
    labels_F = task.labels_F.to(gate_FD.device)
    return LinearRouter(torch.stack([gate_FD[labels_F == expert].mean(0) for expert in range(task.layout.num_routed)]))
