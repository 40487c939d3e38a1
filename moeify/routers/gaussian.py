"""Linear discriminant analysis, one expert at a time: is it among the oracle's K for this token or not?

Inputs of either class are taken for Gaussian with the same covariance; the log odds then are linear in the input, with
rows Sigma^-1 (mu_in - mu_out). The intercept is dropped, because native targets hold none, and prior odds with it.

Each expert has a within-class covariance of its own, but all are the total one less a matrix of rank one, so a single
factorisation serves them all (Sherman and Morrison).
"""

import torch

from moeify.routers import LinearRouter, RoutingTask
from moeify.routers._oracle import membership

# Added to the covariance, relative to its mean variance.
PENALTY = 0.01


def fit(task: RoutingTask) -> LinearRouter:
    """An expert that all tokens choose, or none, gets a row of zeros."""
    inputs_TD = task.inputs_TD - task.inputs_TD.mean(dim=0)
    covariance_DD = (inputs_TD.T @ inputs_TD).double() / len(inputs_TD)
    damping = PENALTY * covariance_DD.diagonal().mean()
    covariance_DD.diagonal().add_(damping.clamp(min=torch.finfo(inputs_TD.dtype).tiny))
    member_TR = membership(task)
    share_R = member_TR.double().mean(dim=0)
    variance_R = share_R * (1 - share_R)
    # With inputs centred over all tokens, their covariance with membership is variance * (mu_in - mu_out).
    moment_DR = (inputs_TD.T @ member_TR).double() / len(inputs_TD)
    difference_DR = torch.where(variance_R > 0, moment_DR / variance_R, 0)
    solved_DR = torch.cholesky_solve(difference_DR, torch.linalg.cholesky(covariance_DD))
    within_R = 1 - variance_R * (difference_DR * solved_DR).sum(dim=0)
    return LinearRouter((solved_DR / within_R).T.to(inputs_TD.dtype))
