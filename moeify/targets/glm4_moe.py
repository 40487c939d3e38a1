"""GLM-4-MoE: optional q/k/v biases and q/k norm, plain shared experts, sigmoid weights.

Unnormalised weights times a scaling factor of two are 2 * sigmoid(z) = 1 for a near-zero logit: nothing to fold.

Autocast to bfloat16 rounds the scores before the sigmoid, and what comes out of it is rounded to numbers 2^-9 or 2^-8
apart; scores of at most 2^-8 are 2^-10 apart there, so that nearly all experts are equal and 0 to 4 % of tokens keep
theirs. No scale helps: ranking and weights are the same rounded numbers, and within 2^-8 of one there are three.
Without autocast its routers compute in float32, whatever the type of the weights, and all tokens keep their experts.
"""

from typing import Any

import torch
from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.families import GGUFFormat, GGUFValue
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, carried
from moeify.targets._layout import expert_tensors, shared_tensors

AUTOCAST = """\
Do not train or run it under autocast (`bf16=True` or `fp16=True` of the Trainer, mixed precision of accelerate): all
router scores become nearly equal there, and tokens go to other experts. Load it with `dtype=torch.bfloat16` and no
autocast instead, where its routers compute in float32, or use `moeify finetune`, which keeps them in float32."""


# gguf.ExpertGatingFuncType, without the package.
SIGMOID = 2


def refuse(dense: DenseModel, layout: Layout) -> str:
    if dense.activation != "silu":
        return f"vLLM loads it with silu only, not {dense.activation}"
    if not layout.num_shared:
        return "vLLM and llama.cpp need at least one shared expert in it"
    if layout.num_routed < 2:
        return "its group scores need two or more routed experts"
    first = tuple(range(len(layout.dense_layers)))
    return "its dense layers can only be the first ones" if layout.dense_layers != first else ""


def explain(dense: DenseModel) -> str:
    if dense.attention.output_bias:
        return "its attention has no bias on o"
    return "it has no sliding window" if dense.attention.sliding_window else ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        # Both transformers and vLLM would otherwise rotate only half of each head.
        "rope_parameters": {"partial_rotary_factor": 1.0, **(dense.text_config.rope_parameters or {})},
        "head_dim": dense.attention.head_dim,
        "attention_bias": dense.attention.qkv_bias,
        "use_qk_norm": dense.attention.qk_norm,
        "intermediate_size": dense.num_neurons,
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


def gguf_keys(config: Any) -> dict[str, GGUFValue]:
    return {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "leading_dense_block_count": config.first_k_dense_replace,
        "nextn_predict_layers": 0,
    }


TARGET = Target(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    preference=3,
    holds_shared=True,
    engines=("vLLM", "SGLang", "llama.cpp"),
    engines_with_dense=("vLLM", "SGLang", "llama.cpp"),
    refuse=refuse,
    explain=explain,
    config=config,
    routed_fold=lambda layout: 1.0,
    ffn_tensors=ffn_tensors,
    untie=True,
    autocast=AUTOCAST,
    gguf=GGUFFormat("glm4moe", keys=gguf_keys, names={"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}),
    modules=Modules(
        experts="mlp.experts",
        router="mlp.gate",
        shared="mlp.shared_experts",
        shared_gate_up=("gate_proj", "up_proj"),
        shared_down="down_proj",
    ),
)
