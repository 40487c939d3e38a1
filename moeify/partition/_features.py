"""What several partitions cluster: contribution-energy profiles beside gate_proj rows, in few dimensions.

Legend: N sampled tokens, D hidden size, n routed neurons, P components.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moeify.calibration.activations import ActivationStats
from moeify.models.ffn import FFNWeights

# Principal components kept of a profile; 32, 64 and 128 gave the same layer error within noise.
PROFILE_COMPONENTS = 64
# Tokens in a neuron's profile. SmolLM2-135M: 2,048 cost 3 % more layer error, 8,192 gained nothing.
PROFILE_TOKENS = 4096
# Size of the gate rows beside the profiles; of 0.3, 0.5, 1, 2, 3 and 4, two was best or equal for both texts of
# energy.py.
GATE_SCALE = 2.0


def profile_and_gate(ffn: FFNWeights, stats: ActivationStats, routed: Tensor, *, seed: int) -> Tensor:
    """One row for each routed neuron: when and how much it contributes, and what it looks for."""
    profile_nP = principal(_centred(stats.contribution_NF[:, routed].T.abs()), seed=seed)
    gate_nD = _centred(ffn.directions_FD[routed])
    return torch.cat([_unit(profile_nP), GATE_SCALE * _unit(gate_nD)], dim=1)


def principal(rows_nN: Tensor, *, seed: int) -> Tensor:
    """rows_nP in a basis of their PROFILE_COMPONENTS leading directions; of evenly spaced tokens, if there are many."""
    from sklearn.utils.extmath import randomized_range_finder

    rows_nN = rows_nN[:, :: -(-rows_nN.shape[1] // PROFILE_TOKENS)]
    components = min(PROFILE_COMPONENTS, *rows_nN.shape)
    # k-means does not care for the rotation of its space, so a basis will do where PCA would cost a further SVD.
    basis_NP = randomized_range_finder(rows_nN.T.cpu().numpy(), size=components, n_iter=2, random_state=seed)
    return rows_nN @ torch.from_numpy(basis_NP).to(rows_nN)


def _centred(rows: Tensor) -> Tensor:
    """Rows of unit length, less their mean."""
    rows = normalize(rows, dim=1)
    return rows - rows.mean(dim=0)


def _unit(rows: Tensor) -> Tensor:
    """Scaled to a mean squared row length of one."""
    length = rows.square().sum(dim=1).mean().sqrt()
    return rows / length.clamp(min=torch.finfo(rows.dtype).tiny)
