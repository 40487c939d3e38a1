"""A random split, the lower bound; shared neurons are random too, so nothing is learned from the text."""

import torch
from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.partition import contiguous


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:
    """labels_F; see the package for the contract."""
    labels_F = contiguous.partition(ffn, stats, layout, seed=seed)
    return labels_F[torch.randperm(ffn.num_neurons, generator=torch.Generator().manual_seed(seed))]
