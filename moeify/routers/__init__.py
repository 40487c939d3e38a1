"""How a token's experts are chosen, one method a file: `fit(task) -> Router`.

A good router ranks the experts by what leaving them out would cost. Linear ones without an intercept are what every
stock target computes; a method whose router has a hidden layer says how wide that is (`WIDTH`), which moeify's own
architecture has. A method whose router is neither says `LINEAR = False`: `moeify compare` measures it, no target
has it.

Set-up and machine as in moeify.partition, partition `routed`, 24 and 16 of 32 experts active: ridge 0.0525 and 0.1243,
membership 0.0494 and 0.1217, and 0.0613 and 0.1419 for a linear discriminant an expert, which is gone.

Legend: T tokens, N sampled tokens, D hidden size, F neurons, R routed experts, H hidden units of a router, C = D + 1.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moeify import plugins
from moeify.calibration.activations import ActivationStats
from moeify.calibration.share import ALONE, Share
from moeify.experts.mixing import router_features
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights


@dataclass(frozen=True)
class RoutingTask:
    """What a router is fitted to, for one layer.

    Args:
        ffn: the dense FFN.
        labels_F: the partition.
        layout: how many experts a token gets.
        stats: of the dense FFN.
        inputs_TD: what the router will see; in bfloat16, and in the CPU's memory, if it lies on the disk.
        norms_TR: norm of what each routed expert would add to each token's output, times the token's weight.
        seed: of whatever is random.
        share: whose tokens these are: sums over tokens are over those of all processes.
    """

    ffn: FFNWeights
    labels_F: Tensor
    layout: Layout
    stats: ActivationStats
    inputs_TD: Tensor
    norms_TR: Tensor
    seed: int
    share: Share = ALONE


class Router(Protocol):
    """A fitted router."""

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        """scores_TR: higher is chosen first."""
        ...


@dataclass(frozen=True)
class LinearRouter:
    """Scores are products with one row an expert.

    Args:
        rows_RD: the rows; of hidden units rows_RH.
        units_HC: weights of the hidden units that they are multiplied with and, behind them, their biases; None if
            they are multiplied with the inputs.
        threshold_R: what is subtracted from the scores: experts above zero are chosen; None if as many are for all.
    """

    rows_RD: Tensor
    units_HC: Tensor | None = None
    threshold_R: Tensor | None = None

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        scores_TR = router_features(inputs_TD, self.units_HC) @ self.rows_RD.to(inputs_TD).T
        return scores_TR if self.threshold_R is None else scores_TR - self.threshold_R.to(scores_TR)


class Fit(Protocol):
    def __call__(self, task: RoutingTask) -> Router: ...


def find(name: str) -> Fit:
    method: Fit = plugins.load(__name__, name, "fit")
    return method


def width(name: str) -> int:
    """Hidden units of what this method fits; 0 if it has none."""
    return int(plugins.load(__name__, name, "WIDTH", 0))


def is_linear(name: str) -> bool:
    """False if no stock target can hold what this method fits."""
    return is_written(name) and not width(name)


def is_written(name: str) -> bool:
    """False if no target at all can hold what this method fits."""
    return bool(plugins.load(__name__, name, "LINEAR", True))


def names() -> list[str]:
    return plugins.names(__name__)
