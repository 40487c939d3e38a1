"""CMoE's analytic router (https://arxiv.org/abs/2502.04416v3): one neuron speaks for each expert.

It is the member whose activation marker lies nearest, by L2, to the mean marker of the expert; if several do, the one
marked most often. Its score is the size of what it would compute with weight rows of unit length. Inputs are not scaled
here, as in the authors' code and unlike in the markers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.activations import ACT2FN

from moeify.calibration.markers import distances, markers
from moeify.routers import RoutingTask

LINEAR = False


@dataclass(frozen=True)
class RepresentativeRouter:
    """Weight rows of one neuron an expert."""

    gate_RD: Tensor
    up_RD: Tensor
    activation: str

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        gated_TR: Tensor = ACT2FN[self.activation](inputs_TD @ self.gate_RD.to(inputs_TD).T)
        return (gated_TR * (inputs_TD @ self.up_RD.to(inputs_TD).T)).abs()


def fit(task: RoutingTask) -> RepresentativeRouter:
    """Nothing is learned from norms_TR."""
    chosen_R = representatives(task)
    return RepresentativeRouter(
        normalize(task.ffn.gate_FD[chosen_R], dim=1).to(task.inputs_TD),
        normalize(task.ffn.up_FD[chosen_R], dim=1).to(task.inputs_TD),
        task.ffn.activation,
    )


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
