"""Mixtral: llama or mistral attention with its window, no shared experts, weights normalised over the selected."""

from typing import Any

from torch import Tensor

from moeify.families import Traits
from moeify.plan import Layout
from moeify.targets import Modules, SplitFFN, Target, carried, head_dim
from moeify.targets._layout import expert_tensors


def refuse(traits: Traits, config: Any, layout: Layout) -> str:
    if traits.qkv_bias or traits.output_bias:
        return "its attention has no biases"
    if traits.qk_norm:
        return "its attention has no q/k norm"
    if traits.sliding_window and not traits.slides_everywhere:
        return "its sliding window covers all layers or none"
    return ""


def config(dense: Any, traits: Traits, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        "head_dim": head_dim(dense),
        "sliding_window": traits.sliding_window,
        "intermediate_size": width,
        "num_local_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    block = f"{prefix}.block_sparse_moe"
    return {
        **expert_tensors(block, ffn, gate="w1", up="w3", down="w2"),
        f"{block}.gate.weight": ffn.router_RD,
    }


TARGET = Target(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    holds_shared=False,
    engines=("vLLM", "SGLang", "llama.cpp"),
    mixings=("hard", "softmax", "soft"),
    refuse=refuse,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    modules=Modules(experts="mlp.experts", router="mlp.gate"),
)
