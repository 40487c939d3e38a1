"""Granite-MoE with shared experts: llama attention, plain shared experts, softmax over the selected experts' logits.

The four multipliers of the granite family are carried, and neutral for a llama. llama.cpp has this one with llama3 rope
factors.
"""

from typing import Any

import torch
from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.families import GGUFFormat, GGUFValue
from moeify.families.granite import gguf_factors
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, carried


def explain(dense: DenseModel) -> str:
    attention = dense.attention
    if attention.qkv_bias != attention.output_bias:
        return "its attention has biases on q, k, v and o or on none"
    if attention.qk_norm:
        return "its attention has no q/k norm"
    if attention.sliding_window:
        return "it has no sliding window"
    if not attention.has_default_head_dim:
        return "its head size is always hidden size / heads"
    return ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        "attention_bias": dense.attention.qkv_bias,
        "attention_multiplier": getattr(dense.text_config, "attention_multiplier", dense.attention.head_dim**-0.5),
        "embedding_multiplier": dense.family.embedding_scale(dense.text_config),
        "residual_multiplier": getattr(dense.text_config, "residual_multiplier", 1.0),
        "logits_scaling": getattr(dense.text_config, "logits_scaling", 1.0),
        "intermediate_size": width,
        "shared_intermediate_size": layout.num_shared * width,
        "num_local_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    block = f"{prefix}.block_sparse_moe"
    shared = {
        f"{prefix}.shared_mlp.input_linear.weight": torch.cat([ffn.gate_sD, ffn.up_sD]),
        f"{prefix}.shared_mlp.output_linear.weight": ffn.down_Ds,
    }
    return {
        f"{block}.input_linear.weight": torch.cat([ffn.gate_RfD, ffn.up_RfD], dim=1),
        f"{block}.output_linear.weight": ffn.down_RDf,
        f"{block}.router.layer.weight": ffn.router_RD,
        **(shared if ffn.gate_sD.shape[0] else {}),
    }


def gguf_keys(config: Any) -> dict[str, GGUFValue]:
    shared = config.shared_intermediate_size
    return {
        **gguf_factors(config),
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        **({"expert_shared_feed_forward_length": shared} if shared else {}),
    }


TARGET = Target(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    preference=1,
    holds_shared=True,
    engines=("vLLM", "SGLang", "llama.cpp"),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    explain=explain,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    gguf=GGUFFormat(
        "granitemoe",
        interleaved=True,
        keys=gguf_keys,
        halves={
            "block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps"),
            "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
        },
    ),
    modules=Modules(
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.router",
        shared="shared_mlp",
        shared_gate_up=("input_linear",),
        shared_down="output_linear",
    ),
)
