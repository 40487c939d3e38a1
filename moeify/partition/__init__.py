"""Which neuron goes to which expert, one method a file: `partition(ffn, stats, layout, *, seed) -> labels_F`.

labels_F is int16: -1 (plan.SHARED) for a neuron that is always on, else its routed expert 0..R-1; every expert gets
exactly F / num_experts neurons and the shared part num_shared times that. The same seed gives the same labels.
"""

from typing import Protocol

from torch import Tensor

from moeify import plugins
from moeify.calibration.activations import ActivationStats
from moeify.models.ffn import FFNWeights
from moeify.plan import Layout


class Partition(Protocol):
    def __call__(self, ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor: ...


def find(name: str) -> Partition:
    method: Partition = plugins.load(__name__, name, "partition")
    return method


def needs_gradients(name: str) -> bool:
    """True if the method looks at stats.gradient_ND."""
    return bool(plugins.load(__name__, name, "GRADIENT", False))


def names() -> list[str]:
    return plugins.names(__name__)
