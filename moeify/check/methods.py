"""The methods that `moeify compare` puts side by side: published ones with their own parts, controls, and ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moeify.convert.depth import BY_DEPTH
from moeify.convert.search_scores import Absent

# What the others are compared with.
REFERENCE = "static + refit"


@dataclass(frozen=True)
class Method:
    """One row of the table: a split's options, or a control that no split can write.

    Args:
        options: of the split, beside budget and calibration.
        control: `oracle` or `bias`, instead of a split.
        absent: what of some layers is left out, instead of a split.
        num_shared: given the number of active experts; None leaves it to the layout.
    """

    options: Mapping[str, Any]
    control: str = ""
    absent: Absent | None = None
    num_shared: Callable[[int], int] | None = None


def methods(experts: int) -> dict[str, Method]:
    """What is compared, by name; published methods with their own parts only.

    Peers get hard unit weights, without which they collapse untrained, and no refit. Where they train a router, theirs
    is fitted to the calibration tokens (MoEfication's MLP) or has the experts' centroids for rows (LLaMA-MoE). CMoE
    shares half of the active experts, LLaMA-MoE v2 one.
    """

    def half(active: int) -> int:
        return active // 2

    def one(active: int) -> int:
        # Of a single active expert nothing would be routed.
        return min(1, active - 1)

    # The refit's options do not concern them, so that they need not be measured again when those change.
    peer = {"refit": False, "refit_to": "ffn"}
    return {
        "neuron oracle": Method({}, control="oracle"),
        "static": Method({"static": True, **peer}),
        REFERENCE: Method({"static": True}),
        "static + bias (FLAP)": Method({}, control="bias"),
        BY_DEPTH: Method({}, absent=Absent.LAYER),
        "static without FFNs": Method({}, absent=Absent.FFN),
        "random": Method({"partition": "random", "router": "ridge", **peer}, num_shared=half),
        "LLaMA-MoE": Method({"partition": "random", "router": "centroid", **peer}, num_shared=lambda _: 0),
        "LLaMA-MoE v2": Method({"partition": "gradient", "router": "centroid", **peer}, num_shared=one),
        "MoEfication": Method({"partition": "kmeans", "router": "mlp", **peer}, num_shared=lambda _: 0),
        "CMoE": Method({"partition": "marker", "router": "representative", **peer}, num_shared=half),
        "energy clusters + refit": Method({"partition": "energy"}, num_shared=half),
        **{f"moeify {count} experts": Method({"experts": count}) for count in sorted({experts, 8, 32, 128})},
    }
