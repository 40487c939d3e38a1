"""The default: ridge regression of every expert's output norm on the FFN input, solved once.

On SmolLM2-135M training the same rows on the oracle's choices afterwards (AdamW, binary cross-entropy, weighted by
what is at stake) changed the layer error by less than 2 %, either way.
"""

from moeify.calibration.regression import cholesky, rank
from moeify.routers import LinearRouter, RoutingTask


def fit(task: RoutingTask) -> LinearRouter:
    """w = (X'X + penalty * tr(X'X)/D * I)^-1 X'(n - mean of n over experts).

    Where the number of experts is a token's own, the mean stays: it says how much the token needs.
    """
    factor_DD = cholesky(task.inputs_TD, task.share, task.ffn.up_FD.device)
    return LinearRouter(rank(factor_DD, task.inputs_TD, task.norms_TR, task.share, centre=not task.layout.is_adaptive))
