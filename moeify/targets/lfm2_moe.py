"""LFM2-MoE: lfm2 with experts: short convolutions and attention, no shared experts, sigmoid weights.

Unnormalised weights times a scaling factor of two are 2 * sigmoid(z) = 1 for a near-zero logit, as in glm4_moe. But its
routers compute in the type of the weights, where glm4_moe's compute in float32.
"""

from typing import Any

from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.families import FFNFormat
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, as_it_is, sibling
from moeify.targets._layout import expert_tensors

NAME = "lfm2_moe"
AUTOCAST = """\
Do not train or run it in 16 bits, neither under autocast nor with `dtype=torch.bfloat16`: all router scores become
nearly equal there, and tokens go to other experts. `moeify finetune` keeps its routers in float32."""


def refuse(dense: DenseModel, layout: Layout) -> str:
    if dense.activation != "silu":
        return f"its experts have silu, not {dense.activation}"
    first = tuple(range(len(layout.dense_layers)))
    return "its dense layers can only be the first ones" if layout.dense_layers != first else ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **sibling(dense, NAME),
        "intermediate_size": dense.num_neurons,
        "moe_intermediate_size": width,
        "num_dense_layers": len(layout.dense_layers),
        "num_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
        "use_expert_bias": False,
        "routed_scaling_factor": 2.0,
        "norm_topk_prob": False,
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    block = f"{prefix}.feed_forward"
    return {**expert_tensors(block, ffn, gate="w1", up="w3", down="w2"), f"{block}.gate.weight": ffn.router_RD}


TARGET = Target(
    model_type=NAME,
    architecture="Lfm2MoeForCausalLM",
    preference=15,
    holds_shared=False,
    engines=("vLLM",),
    engines_with_dense=("vLLM",),
    refuse=refuse,
    config=config,
    routed_fold=lambda layout: 1.0,
    ffn_tensors=ffn_tensors,
    carry=as_it_is,
    dense_ffn=FFNFormat(up="feed_forward.w3", down="feed_forward.w2", gate="feed_forward.w1"),
    autocast=AUTOCAST,
    needs_float32="its routers rank scores behind a sigmoid, which are nearly equal in 16 bits",
    modules=Modules(experts="feed_forward.experts", router="feed_forward.gate"),
)
