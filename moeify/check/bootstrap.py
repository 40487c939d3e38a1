"""Bootstrap intervals of a mean or a median: the same draws for everything that is compared, so that pairs stay pairs.

Legend: N observations, S resamples.
"""

import torch
from torch import Tensor

RESAMPLES = 2000
CONFIDENCE = 0.95


def draws(count: int, *, seed: int = 0) -> Tensor:
    """draws_SN, int64: which observations each resample holds, with replacement (Efron 1979)."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def interval(estimates_S: Tensor) -> tuple[float, float]:
    """The middle CONFIDENCE of what the resamples gave, in its unit."""
    edge = (1 - CONFIDENCE) / 2
    low, high = estimates_S.quantile(torch.tensor([edge, 1 - edge], dtype=estimates_S.dtype)).tolist()
    return low, high
