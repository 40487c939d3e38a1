"""A Gaussian mixture on the features of `energy`: clusters may differ in spread, and in which features they are tight.

Expectation maximisation (scikit-learn, diagonal covariances) starts from balanced k-means and knows no sizes; equal
ones come from an exact transport on the negative log responsibilities at the end.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.models.ffn import FFNWeights
from moeify.partition._balanced import balanced_kmeans, label, label_in_turn, split_off_shared, transport
from moeify.partition._features import profile_and_gate
from moeify.plan import Layout

# Added to variances: features have a mean squared row length of about five.
FLOOR = 1e-6


def partition(ffn: FFNWeights, stats: ActivationStats, layout: Layout, *, seed: int) -> Tensor:
    """labels_F; see the package for the contract."""
    routed = split_off_shared(stats, layout)
    if layout.num_routed <= 1 or layout.is_static:
        return label_in_turn(ffn.num_neurons, routed, layout)
    features = profile_and_gate(ffn, stats, routed, seed=seed)
    start = balanced_kmeans(features, layout.num_routed, seed=seed)
    return label(ffn.num_neurons, routed, transport(_surprise(features, start, layout.num_routed)))


def _surprise(features_nP: Tensor, start_n: Tensor, num_clusters: int) -> Tensor:
    """Negative log responsibility of every component of the mixture for every neuron."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    points = features_nP.double().cpu().numpy()
    members = [points[(start_n == cluster).numpy()] for cluster in range(num_clusters)]
    mixture = GaussianMixture(
        num_clusters,
        covariance_type="diag",
        reg_covar=FLOOR,
        weights_init=np.full(num_clusters, 1 / num_clusters),
        means_init=np.stack([member.mean(axis=0) for member in members]),
        precisions_init=np.stack([1 / (member.var(axis=0) + FLOOR) for member in members]),
    )
    with warnings.catch_warnings():
        # A mixture that still moves after all rounds is as good a start for the transport.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(points)
    # predict_proba underflows in so many dimensions, and its logarithm is not public.
    precision, mean = mixture.precisions_, mixture.means_
    distance = points**2 @ precision.T - 2 * points @ (precision * mean).T + (precision * mean**2).sum(axis=1)
    log_likelihood = np.log(mixture.weights_) + (np.log(precision).sum(axis=1) - distance) / 2
    return -torch.from_numpy(log_likelihood).log_softmax(dim=1)
