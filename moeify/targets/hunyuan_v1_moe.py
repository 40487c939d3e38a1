"""Hunyuan 1 MoE: hunyuan_v1_dense with experts: a shared expert as wide as a routed one, weights normalised."""

from typing import Any

from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, as_it_is, sibling
from moeify.targets._layout import expert_tensors, shared_tensors

NAME = "hunyuan_v1_moe"


def refuse(dense: DenseModel, layout: Layout) -> str:
    return "" if layout.num_shared == 1 else f"it has one shared expert, not {layout.num_shared} (use --shared 1)"


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **sibling(dense, NAME),
        "head_dim": dense.attention.head_dim,
        "intermediate_size": width,
        "num_experts": layout.num_routed,
        "moe_topk": layout.num_routed_active,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    mlp = f"{prefix}.mlp"
    return {
        **expert_tensors(mlp, ffn),
        **shared_tensors(f"{mlp}.shared_mlp", ffn),
        f"{mlp}.gate.wg.weight": ffn.router_RD,
    }


TARGET = Target(
    model_type=NAME,
    architecture="HunYuanMoEV1ForCausalLM",
    preference=12,
    holds_shared=True,
    num_shared=1,
    engines=("vLLM",),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    refuse=refuse,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    carry=as_it_is,
    modules=Modules(
        experts="mlp.experts",
        router="mlp.gate",
        router_weight="wg.weight",
        shared="mlp.shared_mlp",
        shared_gate_up=("gate_proj", "up_proj"),
        shared_down="down_proj",
    ),
)
