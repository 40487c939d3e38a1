"""Neurons in the order in which they are stored: the first slices are shared, each further slice is an expert."""

import torch
from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.plan import SHARED


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:  # noqa: ARG001
    """labels_F; see the package for the contract."""
    width = layout.expert_width(ffn.num_neurons)
    return (torch.arange(ffn.num_neurons) // width - layout.num_shared).clamp(min=SHARED).to(torch.int16)
