"""What a layout costs in quality, by what was measured of one small model: a guide to choose by, not a promise.

The table is of SmolLM2-135M-Instruct, nothing trained, calibrated on 16,384 tokens of five texts and measured on 30,720
tokens of three others (recipes/README.md, 2026-11-22). A quarter of the active experts was shared. Larger models have
more to spare and lose less, fine-tuning wins a part back, and other text gives other numbers.
"""

import math
from collections.abc import Mapping

from moeify.layout import Layout

# Share of the FFN active -> number of experts -> perplexity over dense.
MEASURED: Mapping[float, Mapping[int, float]] = {
    0.75: {8: 49.1 / 36.3, 32: 47.7 / 36.3, 128: 46.2 / 36.3},
    0.5: {8: 78.6 / 36.3, 32: 71.8 / 36.3, 128: 66.4 / 36.3},
}
# The same of static pruning with refit.
STATIC: Mapping[float, float] = {0.75: 55.2 / 36.3, 0.5: 93.2 / 36.3}
# Of the active experts, where MEASURED was measured.
SHARED = 0.25


def expected_ratio(layout: Layout) -> float | None:
    """Perplexity over the dense model's that a layout had, or would have between measured ones, in that small model.

    Between measured points the logarithm is interpolated: over the active share, with no loss at a share of one; over
    the logarithm of the number of experts; and, with more than a quarter of the active experts shared, towards static
    pruning, where all of them are. Loss grows faster than the share falls, so that a straight line over the share errs
    on the side of more loss.

    Returns:
        None where nothing was measured: fewer than 8 or more than 128 experts, less than half active, none shared.
    """
    share = layout.active_share
    if share < min(MEASURED):
        return None
    static = math.exp(_over_share(STATIC, share))
    if layout.is_static:
        return static
    if not layout.num_shared or not 8 <= layout.num_experts <= 128:
        return None
    routed = _over_share({s: math.exp(_over_experts(by, layout.num_experts)) for s, by in MEASURED.items()}, share)
    toward_static = max(0.0, (layout.num_shared / layout.num_active - SHARED) / (1 - SHARED))
    return math.exp(routed + toward_static * (math.log(static) - routed))


def _over_share(ratios: Mapping[float, float], share: float) -> float:
    """The logarithm of the ratio at a share, on the straight lines between measured ones and none at one."""
    return _interpolated({**{s: math.log(ratio) for s, ratio in ratios.items()}, 1.0: 0.0}, share)


def _over_experts(ratios: Mapping[int, float], experts: int) -> float:
    return _interpolated({math.log(n): math.log(ratio) for n, ratio in ratios.items()}, math.log(experts))


def _interpolated(points: Mapping[float, float], at: float) -> float:
    """The value on the straight line between the two points around `at`, which lies between the outer ones."""
    low, high = max(x for x in points if x <= at + 1e-9), min(x for x in points if x >= at - 1e-9)
    return points[low] if low == high else points[low] + (points[high] - points[low]) * (at - low) / (high - low)
