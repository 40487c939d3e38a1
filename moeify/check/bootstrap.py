"""Bootstrap intervals of a mean or a median: the same draws for everything that is compared, so that pairs stay pairs.

Legend: N observations, S resamples.
"""

import math
from typing import NamedTuple

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


class Estimate(NamedTuple):
    """A value and the two ends of its CONFIDENCE interval."""

    value: float
    low: float
    high: float


def perplexity_of(losses_N: Tensor) -> Estimate:
    """exp of the mean loss in nats; infinite where a float ends."""
    low, high = interval(losses_N[draws(len(losses_N))].mean(dim=1))
    return Estimate(_exp(float(losses_N.mean())), _exp(low), _exp(high))


def perplexity_ratio(losses_N: Tensor, other_N: Tensor) -> Estimate:
    """Perplexity over another model's: the one statistic by which two models are compared.

    Both lost on the same blocks of text, in the same order, and a block is drawn for both at once. A block that is hard
    for one is hard for the other, so this interval is narrower than what two separate ones seem to say.

    Args:
        losses_N, other_N: mean loss in nats of each block.
    """
    return perplexity_of(losses_N - other_N)


def mean_of(values_N: Tensor) -> Estimate:
    """The mean, and its interval."""
    return Estimate(float(values_N.mean()), *interval(values_N[draws(len(values_N))].mean(dim=1)))


def mean_ratio(values_N: Tensor, other_N: Tensor) -> Estimate:
    """A mean over another one of the same blocks, each drawn for both at once; NaN where that is zero."""
    drawn_SN = draws(len(values_N))
    ratios_S = values_N[drawn_SN].mean(dim=1) / other_N[drawn_SN].mean(dim=1)
    return Estimate(float(values_N.mean() / other_N.mean()), *interval(ratios_S))


def _exp(value: float) -> float:
    """Infinite where a float ends or there is no number."""
    try:
        return math.exp(value) if not math.isnan(value) else math.inf
    except OverflowError:
        return math.inf
