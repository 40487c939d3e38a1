"""What the chosen experts' outputs are multiplied with, and how they are put together.

Legend: T tokens, R routed experts, K of them chosen for a token, D hidden size, H hidden units of a router, C = D + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from moeify.layout import Layout
from moeify.options import Fusion, SplitOptions, Style

# Halvings of a range of scores: float32 knows no more.
BISECTIONS = 30


@dataclass(frozen=True)
class Mixing:
    """Weights of the routed experts.

    Args:
        style: `hard` gives each chosen expert the same weight; `softmax` weights the chosen ones by their scores;
            `soft` is a softmax over all experts, in a layout with every expert active.
        temperature: scores are divided by it before a softmax; they lie within +-ROUTER_LIMIT.
        fusion: weights add up to the number of chosen experts (`sum`) or to one (`mean`).
    """

    style: Style = "hard"
    temperature: float = 1.0
    fusion: Fusion = "sum"

    @classmethod
    def of(cls, options: SplitOptions) -> "Mixing":
        """The mixing that a split asks for."""
        return cls(options.mixing, options.temperature, options.fusion)

    def weights(self, scores_TR: Tensor, layout: Layout) -> Tensor:
        """weights_TR, zero for experts that are not chosen; in the dtype of the scores."""
        keep_TR = above_threshold(scores_TR, layout) if layout.is_adaptive else choose_experts(scores_TR, layout)
        total = layout.num_routed_active if self.fusion == "sum" else 1.0
        if self.style == "hard":
            return keep_TR.to(scores_TR.dtype) * (total / layout.num_routed_active)
        masked_TR = torch.where(keep_TR, scores_TR / self.temperature, -torch.inf)
        return masked_TR.softmax(dim=1) * total


UNIT = Mixing()


def router_features(inputs_TD: Tensor, units_HC: Tensor | None) -> Tensor:
    """What the rows of a router are multiplied with: the inputs, or hidden units on them, which are at least zero."""
    if units_HC is None:
        return inputs_TD
    units_HC = units_HC.to(inputs_TD)
    return linear(inputs_TD, units_HC[:, :-1], units_HC[:, -1]).relu()


def common_shift(mean: Callable[[float], float], most: float, number: float) -> float:
    """What is added to all thresholds of a layer so that its tokens have so many experts in the mean.

    Args:
        mean: number of experts of a token, in the mean, for what is added.
        most: beyond this on either side nothing changes.
        number: of routed experts.
    """
    low, high = -most, most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > number else (low, middle)
    return high


def above_threshold(scores_TR: Tensor, layout: Layout) -> Tensor:
    """keep_TR, True for the routed experts whose score is above zero; as few and as many as the layout says."""
    least, most = layout.routed_range
    best_TM, chosen_TM = scores_TR.topk(most, dim=1)
    keep_TM = best_TM > 0
    keep_TM[:, :least] = True
    return torch.zeros_like(scores_TR, dtype=torch.bool).scatter_(1, chosen_TM, keep_TM)


def choose_experts(scores_TR: Tensor, layout: Layout) -> Tensor:
    """keep_TR, True for the K routed experts that score highest for a token."""
    chosen = scores_TR.topk(layout.num_routed_active, dim=1).indices
    return torch.zeros_like(scores_TR, dtype=torch.bool).scatter_(1, chosen, value=True)
