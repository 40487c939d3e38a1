"""Every router: shape, dtype, reproducibility, and that it ranks experts by what they would add."""

import pytest
import torch
from torch import Tensor

from moeify import routers
from moeify.routers import ridge

TOKENS, HIDDEN, ROUTED = 800, 16, 6


def planted(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """inputs_TD and norms_TR = what all experts have in common + a linear function of the input; router_RD of it."""
    generator = torch.Generator().manual_seed(seed)
    inputs_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    router_RD = torch.randn(ROUTED, HIDDEN, generator=generator)
    common_T1 = 30 + 5 * torch.rand(TOKENS, 1, generator=generator)
    return inputs_TD, common_T1 + inputs_TD @ router_RD.T, router_RD - router_RD.mean(0)


def agreement(scores_TR: Tensor, norms_TR: Tensor, count: int = 2) -> float:
    """Share of the best experts that are also the highest scored."""
    best = [set(row.tolist()) for row in norms_TR.topk(count, dim=1).indices]
    found = [set(row.tolist()) for row in scores_TR.topk(count, dim=1).indices]
    return sum(len(a & b) for a, b in zip(best, found, strict=True)) / (count * len(best))


@pytest.mark.parametrize("name", routers.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_repeatability(name: str, dtype: torch.dtype) -> None:
    inputs_TD, norms_TR, _ = (t.to(dtype) for t in planted())
    weight_T = torch.ones(TOKENS, dtype=dtype)
    before = [t.clone() for t in (inputs_TD, norms_TR, weight_T)]
    torch.manual_seed(1)
    first = routers.find(name)(inputs_TD, norms_TR, weight_T)
    torch.manual_seed(2)
    assert torch.equal(first, routers.find(name)(inputs_TD, norms_TR, weight_T))
    assert (first.shape, first.dtype) == ((ROUTED, HIDDEN), dtype)
    assert first.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, (inputs_TD, norms_TR, weight_T), strict=True))


@pytest.mark.parametrize("name", routers.names())
def test_a_planted_linear_ranking_is_recovered_on_other_tokens(name: str) -> None:
    inputs_TD, norms_TR, planted_RD = planted()
    half = TOKENS // 2
    found_RD = routers.find(name)(inputs_TD[:half], norms_TR[:half], torch.ones(half))
    assert agreement(inputs_TD[half:] @ found_RD.T, norms_TR[half:]) > 0.98
    # Chance is a third: the test can fail.
    assert agreement(inputs_TD[half:] @ planted_RD.flip(0).T, norms_TR[half:]) < 0.6


@pytest.mark.parametrize("name", routers.names())
def test_one_routed_expert_is_possible(name: str) -> None:
    inputs_TD, norms_TR, _ = planted()
    assert routers.find(name)(inputs_TD, norms_TR[:, :1], torch.ones(TOKENS)).shape == (1, HIDDEN)


@pytest.mark.parametrize("name", routers.names())
def test_a_massive_token_does_not_decide(name: str) -> None:
    inputs_TD, norms_TR, _ = planted()
    norms_TR[0] = norms_TR[0].flip(0) * 1000
    weight_T = torch.ones(TOKENS)
    weight_T[0] = 1 / 1000
    found_RD = routers.find(name)(inputs_TD, norms_TR, weight_T)
    assert agreement(inputs_TD[1:] @ found_RD.T, norms_TR[1:]) > 0.95
    unweighted_RD = routers.find(name)(inputs_TD, norms_TR, torch.ones(TOKENS))
    assert agreement(inputs_TD[1:] @ unweighted_RD.T, norms_TR[1:]) < 0.7


def test_ridge_is_the_closed_form() -> None:
    inputs_TD, norms_TR, _ = planted()
    weight_T = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1))
    x, y = inputs_TD.double(), (norms_TR * weight_T[:, None]).double()
    y = y - y.mean(dim=1, keepdim=True)
    gram = x.T @ x
    damped = gram + ridge.PENALTY * gram.trace() / HIDDEN * torch.eye(HIDDEN, dtype=torch.float64)
    expected = torch.linalg.solve(damped, x.T @ y).T
    torch.testing.assert_close(ridge.fit(inputs_TD, norms_TR, weight_T).double(), expected, rtol=1e-4, atol=1e-4)


def test_ridge_does_not_see_what_all_experts_have_in_common() -> None:
    inputs_TD, norms_TR, _ = planted()
    offset_T1 = 100 * inputs_TD[:, :1]
    first, second = (ridge.fit(inputs_TD, norms, torch.ones(TOKENS)) for norms in (norms_TR, norms_TR + offset_T1))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)


def test_ridge_holds_when_features_are_constant_or_fewer_tokens_than_features() -> None:
    inputs_TD, norms_TR, _ = planted()
    inputs_TD[:, 3] = 0
    inputs_TD[:, 4] = inputs_TD[:, 5]
    assert ridge.fit(inputs_TD, norms_TR, torch.ones(TOKENS)).isfinite().all()
    assert ridge.fit(inputs_TD[:5], norms_TR[:5], torch.ones(5)).isfinite().all()
