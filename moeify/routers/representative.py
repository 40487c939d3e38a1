"""CMoE's analytic router (https://arxiv.org/abs/2502.04416v3): one neuron speaks for each expert.

It is the member whose activation marker lies nearest, by L2, to the mean marker of the expert; if several do, the one
marked most often. Its score is the size of what it would compute with weight rows of unit length. Inputs are not scaled
here, as in the authors' code and unlike in the markers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.calibration.markers import distances, markers, unit_rows
from moeify.models.ffn import FFNWeights
from moeify.routers import RoutingTask

LINEAR = False


@dataclass(frozen=True)
class RepresentativeRouter:
    """The FFN of one neuron an expert, its rows of unit length."""

    neurons: FFNWeights

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        scores_TR: Tensor = self.neurons.map(lambda tensor: tensor.to(inputs_TD)).hidden(inputs_TD).abs()
        return scores_TR


def fit(task: RoutingTask) -> RepresentativeRouter:
    """Nothing is learned from norms_TR."""
    return RepresentativeRouter(unit_rows(task.ffn.neurons(representatives(task))))


def representatives(task: RoutingTask) -> Tensor:
    """The neuron that speaks for each expert."""
    marker_NF, ranking_F = markers(task.ffn, task.stats.inputs_ND)
    labels_F = task.labels_F.to(ranking_F.device)[ranking_F]
    chosen = []
    for expert in range(task.layout.num_routed):
        members = ranking_F[labels_F == expert]
        marker_Nf = marker_NF[:, members]
        chosen.append(members[distances(marker_Nf, marker_Nf.mean(dim=1, keepdim=True)).argmin()])
    return torch.stack(chosen)
