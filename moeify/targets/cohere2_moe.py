"""Command A MoE: cohere2 with experts: attention and experts beside each other, plain shared experts.

Its layers with a sliding window rotate, the others do not. So a cohere, which rotates everywhere and has no window, is
one whose window no text fills.
"""

from typing import Any

from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, as_it_is, sibling
from moeify.targets._layout import expert_tensors, shared_tensors

NAME = "cohere2_moe"
SLIDING = "sliding_attention"


def explain(dense: DenseModel) -> str:
    return "its attention has no q/k norm" if dense.attention.qk_norm else ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    window = getattr(dense.text_config, "sliding_window", None) or int(dense.text_config.max_position_embeddings)
    return {
        **sibling(dense, NAME),
        "head_dim": dense.attention.head_dim,
        "layer_types": list(getattr(dense.text_config, "layer_types", None) or [SLIDING] * dense.num_layers),
        "sliding_window": window,
        # It has another norm if this is given.
        "rms_norm_eps": None,
        "mlp_layer_types": ["sparse"] * dense.num_layers,
        "intermediate_size": width,
        "num_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
        "num_shared_experts": layout.num_shared,
        "shared_expert_combination_strategy": "sum",
        "expert_selection_fn": "softmax",
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    mlp = f"{prefix}.mlp"
    return {
        **expert_tensors(mlp, ffn),
        **(shared_tensors(f"{mlp}.shared_experts", ffn) if ffn.gate_sD.shape[0] else {}),
        f"{mlp}.gate.weight": ffn.router_RD,
    }


TARGET = Target(
    model_type=NAME,
    architecture="Cohere2MoeForCausalLM",
    preference=13,
    holds_shared=True,
    engines=(),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
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
