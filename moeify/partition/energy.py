"""The default: neurons that contribute most are shared, the rest is clustered by when, and how much, they contribute.

A neuron's contribution-energy profile is the vector of its contributions to sampled tokens, scaled to unit length, less
the mean profile. Unlike the binary activation markers of CMoE (https://arxiv.org/abs/2502.04416) it keeps the sizes,
which on SmolLM2-135M leaves 22 % less layer error under the same linear router.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moeify.activations import ActivationStats, FFNWeights
from moeify.partition._balanced import balanced_kmeans, label, split_off_shared
from moeify.plan import Layout

# Principal components kept of a profile; 32, 64 and 128 gave the same layer error within noise.
PROFILE_COMPONENTS = 64


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:
    """labels_F; see the package for the contract."""
    from sklearn.utils.extmath import randomized_range_finder

    routed = split_off_shared(stats, layout)
    if layout.num_routed == 1 or layout.is_static:
        return label(ffn.num_neurons, routed, torch.arange(len(routed)) % max(1, layout.num_routed))
    profile_NT = normalize(stats.contribution_FN[routed], dim=1)
    profile_NT = profile_NT - profile_NT.mean(dim=0)
    components = min(PROFILE_COMPONENTS, *profile_NT.shape)
    # k-means does not care for the rotation of its space, so a basis will do where PCA would cost a further SVD.
    basis_TP = randomized_range_finder(profile_NT.T.cpu().numpy(), size=components, n_iter=2, random_state=seed)
    features_NP = profile_NT @ torch.from_numpy(basis_TP).to(profile_NT)
    return label(ffn.num_neurons, routed, balanced_kmeans(features_NP, layout.num_routed, seed=seed))
