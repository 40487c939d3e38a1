"""Qwen3-MoE: attention with q/k norm, no shared experts, weights normalised over the selected."""

from typing import Any

from torch import Tensor

from moeify.families import Traits
from moeify.plan import Layout
from moeify.targets import Modules, SplitFFN, Target, carried, head_dim
from moeify.targets._layout import expert_tensors


def refuse(traits: Traits, config: Any, layout: Layout) -> str:
    if not traits.qk_norm:
        return "its attention always has a q/k norm"
    if traits.qkv_bias != traits.output_bias:
        return "its attention has biases on q, k, v and o or on none"
    if traits.sliding_window and not traits.slides_everywhere:
        return "its sliding window covers all layers or none"
    return ""


def config(dense: Any, traits: Traits, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        "head_dim": head_dim(dense),
        "attention_bias": traits.qkv_bias,
        "use_sliding_window": traits.sliding_window is not None,
        "sliding_window": traits.sliding_window,
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": width,
        "num_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
        # llama.cpp always normalises the weights of this architecture.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(layout.dense_layers),
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    return {**expert_tensors(f"{prefix}.mlp", ffn), f"{prefix}.mlp.gate.weight": ffn.router_RD}


TARGET = Target(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    holds_shared=False,
    engines=("vLLM", "SGLang", "llama.cpp"),
    engines_with_dense=("vLLM", "SGLang"),
    mixings=("hard", "softmax", "soft"),
    refuse=refuse,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    modules=Modules(experts="mlp.experts", router="mlp.gate"),
)
