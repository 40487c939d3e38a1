"""Ridge regression on FFN inputs: one factorisation for all targets on the same tokens.

Legend: T tokens, D hidden size, R experts.
"""

import torch
from torch import Tensor

# Relative to the mean feature variance. 0.001 to 0.1 gave the same layer error within 1 % on SmolLM2-135M.
PENALTY = 0.01


def cholesky(inputs_TD: Tensor) -> Tensor:
    """Factor of X'X + penalty * tr(X'X)/D * I, float64."""
    gram_DD = (inputs_TD.T @ inputs_TD).double()
    gram_DD.diagonal().add_((PENALTY * gram_DD.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny))
    factor_DD: Tensor = torch.linalg.cholesky(gram_DD)
    return factor_DD


def rank(factor_DD: Tensor, inputs_TD: Tensor, target_TR: Tensor) -> Tensor:
    """rows_RD that rank experts like the target; what all experts have in common is left out of it."""
    target_TR = target_TR - target_TR.mean(dim=1, keepdim=True)
    moment_DR = (inputs_TD.T @ target_TR).double()
    return torch.cholesky_solve(moment_DR, factor_DD).T.to(inputs_TD.dtype)
