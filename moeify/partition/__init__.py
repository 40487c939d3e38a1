"""Which neuron goes to which expert, one method a file: `partition(ffn, stats, layout, *, seed) -> labels_F`.

labels_F is int16: -1 (plan.SHARED) for a neuron that is always on, else its routed expert 0..R-1; every expert gets
exactly F / num_experts neurons and the shared part num_shared times that. The same seed gives the same labels.

Relative error of the FFN output on Moby-Dick and State of the Union under a ridge router and refit, geometric mean of
six layers of SmolLM2-135M, 32 experts, 8,192 tokens of Wikipedia and Python's reference (2 cores of an Intel Xeon,
2026-11-25, `python tests/benchmark_methods.py`):

| active | routed | energy | kmeans | random | contiguous | mixture | coactivation | pattern |
|---|---|---|---|---|---|---|---|---|
| 24 | 0.0525 | 0.0569 | 0.0622 | 0.1105 | 0.1178 | 0.0569 | 0.0606 | 0.0662 |
| 16 | 0.1243 | 0.1378 | 0.1489 | 0.2497 | 0.2555 | 0.1366 | 0.1404 | 0.1455 |

The last three are gone: a Gaussian mixture on the features of `energy`, spectral clusters of a co-activation graph, and
clusters of binary keep patterns.
"""

from typing import Protocol

from torch import Tensor

from moeify import plugins
from moeify.calibration.activations import ActivationStats
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights


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
