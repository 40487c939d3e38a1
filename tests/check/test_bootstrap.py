"""The paired statistic: narrower than two separate intervals, and the same wherever two models are compared."""

import math

import pytest
import torch

from moeify.check.bootstrap import perplexity_of, perplexity_ratio


def test_a_pair_decides_what_two_separate_intervals_leave_open() -> None:
    """Blocks differ by far more than the models do, as texts are hard in places for all."""
    random = torch.Generator().manual_seed(0)
    hard_B = torch.randn(17, generator=random, dtype=torch.float64) * 0.5 + 3.2
    other_B = hard_B + 0.04 + 0.01 * torch.randn(17, generator=random, dtype=torch.float64)
    own, other, pair = perplexity_of(hard_B), perplexity_of(other_B), perplexity_ratio(hard_B, other_B)
    # Two intervals overlap and would be called noise; the pair is certain.
    assert own.high > other.low
    assert pair.high < 1
    assert pair.value == pytest.approx(own.value / other.value)
    assert pair.low <= pair.value <= pair.high
    # Turned round it says the same.
    back = perplexity_ratio(other_B, hard_B)
    assert back == pytest.approx((1 / pair.value, 1 / pair.high, 1 / pair.low))


def test_a_model_against_itself_is_one_without_noise() -> None:
    losses_B = torch.tensor([1.0, 5.0, 2.0])
    assert perplexity_ratio(losses_B, losses_B) == (1.0, 1.0, 1.0)


def test_a_loss_without_end_is_infinite() -> None:
    assert perplexity_of(torch.tensor([1e4, math.nan])).value == math.inf
