"""Qwen3.5-MoE (its language model): qwen3_5_text with experts, a shared expert behind a sigmoid gate as in qwen2_moe.

Every layer has experts, and their weights are normalised over the selected.
"""

from typing import Any

from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Target, as_it_is, qwen2_moe, sibling

NAME = "qwen3_5_moe_text"


def refuse(dense: DenseModel, layout: Layout) -> str:
    return "" if layout.num_shared else "it always has a shared expert"


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **sibling(dense, NAME),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": layout.num_shared * width,
        "num_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    return qwen2_moe.ffn_tensors(prefix, ffn)


TARGET = Target(
    model_type=NAME,
    architecture="Qwen3_5MoeForCausalLM",
    preference=14,
    holds_shared=True,
    engines=(),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    refuse=refuse,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    shared_fold=qwen2_moe.TARGET.shared_fold,
    ffn_tensors=ffn_tensors,
    carry=as_it_is,
    modules=qwen2_moe.TARGET.modules,
)
