"""CMoE (https://arxiv.org/abs/2502.04416v3): neurons marked most often are shared, the others clustered by marker.

One round of balanced assignment to the markers of the most frequent remaining neurons, as in the paper, which guards
massive activations by nothing.

Legend: F neurons, N sampled tokens, n routed neurons, R routed experts.
"""

from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.calibration.markers import distances, markers
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.partition._balanced import label, label_in_turn, transport


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:  # noqa: ARG001
    """labels_F; see the package for the contract."""
    marker_NF, ranking_F = markers(ffn, stats.inputs_ND)
    routed = ranking_F[layout.num_shared * layout.expert_width(ffn.num_neurons) :]
    if layout.num_routed <= 1 or layout.is_static:
        return label_in_turn(ffn.num_neurons, routed, layout)
    marker_Nn = marker_NF[:, routed]
    distance_nR = distances(marker_Nn, marker_Nn[:, : layout.num_routed])
    return label(ffn.num_neurons, routed, transport(distance_nR))
