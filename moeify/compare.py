"""Methods side by side: every one on the same calibration tokens, the same evaluation text, in one run.

Nothing is written as a checkpoint: calibration and evaluation blocks walk through the model together, each layer is
fitted on the former and applied to both. What no native checkpoint can hold (a neuron oracle, an MLP router) can be
compared all the same.

Legend: T tokens, D hidden size, B blocks of C tokens, L = C - 1 losses a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moeify.ffn import FFNWeights

# Fitted to the calibration inputs of a layer, it gives the FFN that takes the dense one's place.
Conversion = Callable[[FFNWeights, Tensor], Callable[[Tensor], Tensor]]
RESAMPLES = 2000
CONFIDENCE = 0.95
REFERENCE = "static + refit"


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Args:
        method: its name.
        active_share: share of the FFN parameters that a token uses.
        perplexity: over all evaluation tokens.
        low, high: bootstrap confidence interval of it, over blocks.
        ratio, ratio_low, ratio_high: perplexity over that of static pruning with refit at the same budget, with the
            interval of the ratio (the same blocks are drawn for both).
        gap_closed: share of the distance in log-perplexity from static + refit to dense.
        texts: perplexity on each text.
        diagnostics: means over layers of what the fit measured.
    """

    method: str
    active_share: float
    perplexity: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    gap_closed: float
    texts: Mapping[str, float]
    diagnostics: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The whole table and what it was measured on."""

    model: str
    rows: tuple[Row, ...]
    calibration: Mapping[str, Any]
    data: Mapping[str, int]
    context: int


def methods(experts: int) -> dict[str, dict[str, Any]]:
    """What `moeify compare` runs at each budget, as options of a split; published methods with their own parts only.

    Peers get hard unit weights, without which they collapse untrained, and no refit. LLaMA-MoE trains its router, so
    here it has the centroids of its experts' gate rows. CMoE shares half of the active experts, as in its paper.
    """
    peer: dict[str, Any] = {"refit": False}
    return {
        "static": {"static": True, "refit": False},
        REFERENCE: {"static": True},
        "random": {"partition": "random", "router": "centroid", "shared": "half", **peer},
        "LLaMA-MoE": {"partition": "random", "router": "centroid", "shared": 0, **peer},
        "LLaMA-MoE v2": {"partition": "gradient", "router": "centroid", "shared": 1, **peer},
        "MoEfication": {"partition": "kmeans", "router": "mlp", "shared": 0, **peer},
        "CMoE": {"partition": "marker", "router": "representative", "shared": "half", **peer},
        "random, our router and refit": {"partition": "random"},
        "energy clusters, our router and refit": {"partition": "energy"},
        **{f"moeify, {count} experts": {"experts": count} for count in sorted({experts, 8, 32, 128})},
    }
