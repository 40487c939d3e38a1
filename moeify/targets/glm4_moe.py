"""GLM-4-MoE: optional q/k/v biases and q/k norm, plain shared experts, sigmoid weights.

Unnormalised weights times a scaling factor of two are 2 * sigmoid(z) = 1 for a near-zero logit: nothing to fold.
"""

from typing import Any

import torch
from torch import Tensor

from moeify.families import Traits
from moeify.plan import Layout
from moeify.targets import Modules, SplitFFN, Target, carried, head_dim
from moeify.targets._layout import expert_tensors, shared_tensors


def refuse(traits: Traits, config: Any, layout: Layout) -> str:
    if traits.output_bias:
        return "its attention has no bias on o"
    if traits.sliding_window:
        return "it has no sliding window"
    if config.hidden_act != "silu":
        return f"vLLM loads it with silu only, not {config.hidden_act}"
    if not layout.num_shared:
        return "vLLM and llama.cpp need at least one shared expert in it"
    if layout.num_routed < 2:
        return "its group scores need two or more routed experts"
    first = tuple(range(len(layout.dense_layers)))
    return "its dense layers can only be the first ones" if layout.dense_layers != first else ""


def config(dense: Any, traits: Traits, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        # Both transformers and vLLM would otherwise rotate only half of each head.
        "rope_parameters": {**dense.rope_parameters, "partial_rotary_factor": 1.0},
        "head_dim": head_dim(dense),
        "attention_bias": traits.qkv_bias,
        "use_qk_norm": traits.qk_norm,
        "intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": width,
        "n_shared_experts": layout.num_shared,
        "n_routed_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": len(layout.dense_layers),
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "num_nextn_predict_layers": 0,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    mlp = f"{prefix}.mlp"
    return {
        **expert_tensors(mlp, ffn),
        **shared_tensors(f"{mlp}.shared_experts", ffn),
        f"{mlp}.gate.weight": ffn.router_RD,
        f"{mlp}.gate.e_score_correction_bias": ffn.router_RD.new_zeros(ffn.router_RD.shape[0], dtype=torch.float32),
    }


TARGET = Target(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    holds_shared=True,
    engines=("vLLM", "SGLang"),
    engines_with_dense=("vLLM", "SGLang"),
    refuse=refuse,
    config=config,
    routed_fold=lambda layout: 1.0,
    ffn_tensors=ffn_tensors,
    untie=True,
    modules=Modules(
        experts="mlp.experts",
        router="mlp.gate",
        shared="mlp.shared_experts",
        shared_gate_up=("gate_proj", "up_proj"),
        shared_down="down_proj",
    ),
)
