"""Weights of each style and fusion against a plain formula."""

import math

import pytest
import torch

from moeify.experts.mixing import UNIT, Mixing, choose_experts
from moeify.layout import Layout
from moeify.options import Fusion, SplitOptions, Style

SCORES_TR = torch.tensor([[0.5, -1.0, 2.0, 1.0], [3.0, 0.0, -2.0, -4.0], [-1.0, 4.0, 3.9, 0.1]])


def by_hand(scores: list[float], count: int, style: Style, temperature: float, fusion: Fusion) -> list[float]:
    """Weights of one token."""
    chosen = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    raw = {i: 1.0 if style == "hard" else math.exp(scores[i] / temperature) for i in chosen}
    total = sum(raw.values()) / (count if fusion == "sum" else 1)
    return [raw.get(i, 0) / total for i in range(len(scores))]


@pytest.mark.parametrize("style", ["hard", "softmax", "soft"])
@pytest.mark.parametrize("fusion", ["sum", "mean"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_are_the_formula(style: Style, fusion: Fusion, temperature: float, count: int) -> None:
    # One shared expert, which no weight depends on.
    layout = Layout(5, 1, 1 + count)
    found_TR = Mixing(style, temperature, fusion).weights(SCORES_TR, layout)
    expected = [by_hand(row, count, style, temperature, fusion) for row in SCORES_TR.tolist()]
    torch.testing.assert_close(found_TR, torch.tensor(expected))
    torch.testing.assert_close(found_TR.sum(dim=1), torch.full((3,), float(count if fusion == "sum" else 1)))
    assert torch.equal(found_TR > 0, choose_experts(SCORES_TR, layout))


def test_hard_weights_of_the_default_are_exactly_one() -> None:
    for count in range(1, 5):
        weights_TR = UNIT.weights(SCORES_TR, Layout(4, 0, count))
        assert weights_TR.unique().tolist() == ([0, 1] if count < 4 else [1])


@pytest.mark.parametrize("style", ["hard", "softmax", "soft"])
def test_a_single_chosen_expert_has_weight_one(style: Style) -> None:
    for fusion in ("sum", "mean"):
        weights_TR = Mixing(style, 0.3, fusion).weights(SCORES_TR, Layout(4, 0, 1))
        assert torch.equal(weights_TR, choose_experts(SCORES_TR, Layout(4, 0, 1)).float())


def test_a_high_temperature_makes_the_chosen_alike_and_a_low_one_leaves_the_best() -> None:
    layout = Layout(4, 0, 3)
    hot_TR, cold_TR = (Mixing("softmax", temperature).weights(SCORES_TR, layout) for temperature in (1e4, 1e-3))
    torch.testing.assert_close(hot_TR, UNIT.weights(SCORES_TR, layout), atol=1e-3, rtol=0)
    torch.testing.assert_close(cold_TR, 3 * choose_experts(SCORES_TR, Layout(4, 0, 1)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("style", ["hard", "softmax", "soft"])
def test_weights_have_the_dtype_of_the_scores(dtype: torch.dtype, style: Style) -> None:
    scores_TR = SCORES_TR.to(dtype)
    assert Mixing(style).weights(scores_TR, Layout(4, 0, 2)).dtype == dtype
    assert torch.equal(scores_TR, SCORES_TR.to(dtype))


def test_scores_that_are_all_alike_give_every_token_its_number_of_experts() -> None:
    for style in ("hard", "softmax"):
        weights_TR = Mixing(style).weights(torch.zeros(5, 6), Layout(8, 2, 5))
        assert (weights_TR > 0).sum(dim=1).tolist() == [3] * 5
        torch.testing.assert_close(weights_TR.sum(dim=1), torch.full((5,), 3.0))


def test_a_mixing_comes_from_options() -> None:
    options = SplitOptions(mixing="softmax", temperature=2.0, fusion="mean")
    assert Mixing.of(options) == Mixing("softmax", 2.0, "mean")
    assert Mixing.of(SplitOptions()) == UNIT
