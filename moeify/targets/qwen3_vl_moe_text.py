"""Qwen3-VL-MoE (its language model): qwen3_vl's with experts, none shared; weights normalised over the selected.

Matrices of experts lie as (in, out) on disk. Transformers turns them where their shape tells, which a square one's does
not: that lies as (out, in), and in a checkpoint is refused, for engines turn it.
"""

from typing import Any

import torch
from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, as_it_is, sibling

NAME = "qwen3_vl_moe_text"


def refuse(dense: DenseModel, layout: Layout) -> str:
    width = layout.expert_width(dense.num_neurons)
    if dense.hidden_size in (width, 2 * width):
        return f"experts of {width} neurons have square matrices, which engines turn and transformers does not"
    return ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **sibling(dense, NAME),
        "intermediate_size": dense.num_neurons,
        "moe_intermediate_size": width,
        "num_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(layout.dense_layers),
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    matrices = {"gate_up_proj": torch.cat([ffn.gate_RfD, ffn.up_RfD], dim=1), "down_proj": ffn.down_RDf}
    return {
        **{
            f"{prefix}.mlp.experts.{name}": weight if weight.shape[1] == weight.shape[2] else weight.mT.contiguous()
            for name, weight in matrices.items()
        },
        f"{prefix}.mlp.gate.weight": ffn.router_RD,
    }


TARGET = Target(
    model_type=NAME,
    # There is none for text alone.
    architecture="",
    preference=15,
    holds_shared=False,
    engines=("vLLM", "SGLang"),
    engines_with_dense=("vLLM", "SGLang"),
    mixings=("hard", "softmax", "soft"),
    normalised=True,
    refuse=refuse,
    config=config,
    routed_fold=lambda layout: layout.num_routed_active,
    ffn_tensors=ffn_tensors,
    carry=as_it_is,
    modules=Modules(experts="mlp.experts", router="mlp.gate"),
)
