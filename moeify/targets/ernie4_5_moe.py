"""Ernie 4.5 MoE: ernie4_5 with experts: plain shared experts, weights normalised over the selected.

The bias by which experts are selected stays zero.
"""

from typing import Any

import torch
from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, as_it_is, sibling
from moeify.targets._layout import expert_tensors, shared_tensors

NAME = "ernie4_5_moe"


def refuse(dense: DenseModel, layout: Layout) -> str:
    if not layout.dense_layers:
        return ""
    cut = [layer for layer in range(dense.num_layers) if layer not in layout.dense_layers]
    between = cut != list(range(cut[0], cut[-1] + 1)) if cut else False
    return "its dense layers can only be the first and the last ones" if between else ""


def explain(dense: DenseModel) -> str:
    if dense.attention.qk_norm:
        return "its attention has no q/k norm"
    return "it has no sliding window" if dense.attention.sliding_window else ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    cut = [layer for layer in range(dense.num_layers) if layer not in layout.dense_layers]
    return {
        **sibling(dense, NAME),
        "head_dim": dense.attention.head_dim,
        "intermediate_size": dense.num_neurons,
        "moe_intermediate_size": width,
        "moe_num_experts": layout.num_routed,
        "moe_num_shared_experts": layout.num_shared,
        "moe_k": layout.num_routed_active,
        "moe_layer_start_index": cut[0],
        "moe_layer_end_index": cut[-1],
        "moe_layer_interval": 1,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    mlp, router_RD = f"{prefix}.mlp", ffn.router_RD
    return {
        **expert_tensors(mlp, ffn),
        **(shared_tensors(f"{mlp}.shared_experts", ffn) if ffn.gate_sD.shape[0] else {}),
        f"{mlp}.gate.weight": router_RD,
        f"{mlp}.moe_statics.e_score_correction_bias": router_RD.new_zeros(1, router_RD.shape[0], dtype=torch.float32),
    }


TARGET = Target(
    model_type=NAME,
    architecture="Ernie4_5_MoeForCausalLM",
    preference=11,
    holds_shared=True,
    engines=("vLLM", "SGLang"),
    engines_with_dense=("vLLM", "SGLang"),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    refuse=refuse,
    explain=explain,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    carry=as_it_is,
    modules=Modules(
        experts="mlp.experts",
        router="mlp.gate",
        shared="mlp.shared_experts",
        shared_gate_up=("gate_proj", "up_proj"),
        shared_down="down_proj",
    ),
)
