"""FlexOlmo: OLMo 2 with experts: norms behind attention and FFN, no shared experts, normalised weights."""

from typing import Any

from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, as_it_is, sibling
from moeify.targets._layout import expert_tensors

NAME = "flex_olmo"


def explain(dense: DenseModel) -> str:
    if not dense.attention.qk_norm:
        return "its attention always has a q/k norm"
    return "it has no sliding window" if dense.attention.sliding_window else ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **sibling(dense, NAME),
        "intermediate_size": width,
        "num_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
        "norm_topk_prob": True,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    return {**expert_tensors(f"{prefix}.mlp", ffn), f"{prefix}.mlp.gate.weight": ffn.router_RD}


TARGET = Target(
    model_type=NAME,
    architecture="FlexOlmoForCausalLM",
    preference=10,
    holds_shared=False,
    engines=("vLLM",),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    explain=explain,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    carry=as_it_is,
    modules=Modules(experts="mlp.experts", router="mlp.gate"),
)
