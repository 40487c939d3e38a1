"""The table of measured losses, and what lies between its points."""

import math
from itertools import pairwise

import pytest

from moeify.convert.expected_loss import MEASURED, STATIC, expected_ratio
from moeify.layout import Layout


@pytest.mark.parametrize("experts", [8, 32, 128])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_measured_points_come_back(experts: int, share: float) -> None:
    active = int(experts * share)
    found = expected_ratio(Layout(experts, active // 4, active))
    assert found == pytest.approx(MEASURED[share][experts])
    assert expected_ratio(Layout(experts, active, active)) == pytest.approx(STATIC[share])


def test_between_points_the_logarithm_is_on_a_straight_line() -> None:
    # 16 is half way from 8 to 32, and 5/8 half way from 1/2 to 3/4.
    sixteen = expected_ratio(Layout(16, 2, 8))
    assert sixteen == pytest.approx(math.sqrt(MEASURED[0.5][8] * MEASURED[0.5][32]))
    assert expected_ratio(Layout(32, 5, 20)) == pytest.approx(math.sqrt(MEASURED[0.5][32] * MEASURED[0.75][32]))
    assert expected_ratio(Layout(32, 7, 28)) == pytest.approx(math.sqrt(MEASURED[0.75][32]))
    # 10 of 16 active shared are half way from a quarter to all.
    assert expected_ratio(Layout(32, 10, 16)) == pytest.approx(math.sqrt(MEASURED[0.5][32] * STATIC[0.5]))


def test_more_active_more_experts_and_fewer_shared_lose_less() -> None:
    def rising(layouts: list[Layout]) -> bool:
        ratios = [expected_ratio(layout) or math.nan for layout in layouts]
        return all(left < right for left, right in pairwise(ratios))

    assert rising([Layout(16, 3, active) for active in (15, 14, 12, 10, 8)])
    assert rising([Layout(n, n // 8, n // 2) for n in (128, 64, 32, 16, 8)])
    assert rising([Layout(32, shared, 16) for shared in (4, 8, 12, 15, 16)])


@pytest.mark.parametrize("layout", [Layout(8, 1, 3), Layout(4, 1, 2), Layout(256, 32, 128), Layout(8, 0, 4)])
def test_nothing_is_said_where_nothing_was_measured(layout: Layout) -> None:
    assert expected_ratio(layout) is None


def test_all_active_loses_nothing() -> None:
    assert expected_ratio(Layout(8, 2, 8)) == pytest.approx(1.0)
