"""Mixtral: llama or mistral attention with its window, no shared experts, weights normalised over the selected."""

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
    if attention.qkv_bias or attention.output_bias:
        return "its attention has no biases"
    if attention.qk_norm:
        return "its attention has no q/k norm"
    if attention.sliding_window and not attention.slides_everywhere:
        return "its sliding window covers all layers or none"
    return ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        "head_dim": dense.attention.head_dim,
        "sliding_window": dense.attention.sliding_window,
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


def gguf_keys(config: Any) -> dict[str, int]:
    return {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}


TARGET = Target(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    preference=5,
    holds_shared=False,
    engines=("vLLM", "SGLang", "llama.cpp"),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    explain=explain,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    gguf=GGUFFormat("llama", interleaved=True, keys=gguf_keys),
    modules=Modules(experts="mlp.experts", router="mlp.gate"),
)
