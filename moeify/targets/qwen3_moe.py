"""Qwen3-MoE: attention with q/k norm, no shared experts, weights normalised over the selected."""

from typing import Any

from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.families import GGUFFormat
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, carried
from moeify.targets._layout import expert_tensors


def explain(dense: DenseModel) -> str:
    attention = dense.attention
    if not attention.qk_norm:
        return "its attention always has a q/k norm"
    if attention.qkv_bias != attention.output_bias:
        return "its attention has biases on q, k, v and o or on none"
    if attention.sliding_window and not attention.slides_everywhere:
        return "its sliding window covers all layers or none"
    return ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        "head_dim": dense.attention.head_dim,
        "attention_bias": dense.attention.qkv_bias,
        "use_sliding_window": dense.attention.sliding_window is not None,
        "sliding_window": dense.attention.sliding_window,
        "intermediate_size": dense.num_neurons,
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


def gguf_keys(config: Any) -> dict[str, int]:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def gguf_refuse(config: Any) -> str:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "it has experts in every layer"
    return "" if config.norm_topk_prob else "it always normalises the weights of experts"


TARGET = Target(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    preference=4,
    holds_shared=False,
    engines=("vLLM", "SGLang", "llama.cpp"),
    engines_with_dense=("vLLM", "SGLang"),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    explain=explain,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    gguf=GGUFFormat("qwen3moe", keys=gguf_keys, refuse=gguf_refuse),
    modules=Modules(experts="mlp.experts", router="mlp.gate"),
)
