"""dots.llm1: attention with q/k norm and a sliding window in some layers, otherwise as glm4_moe."""

from typing import Any

from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Target, glm4_moe, sibling

NAME = "dots1"


def explain(dense: DenseModel) -> str:
    if not dense.attention.qk_norm:
        return "its attention always has a q/k norm"
    if dense.attention.qkv_bias != dense.attention.output_bias:
        return "its attention has biases on q, k, v and o or on none"
    return ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    glm = glm4_moe.config(dense, layout, width)
    del glm["use_qk_norm"], glm["num_nextn_predict_layers"]
    # That it rotates whole heads is not said in it.
    return {**glm, **sibling(dense, NAME), "intermediate_size": dense.num_neurons}


TARGET = Target(
    model_type=NAME,
    architecture="Dots1ForCausalLM",
    preference=6,
    holds_shared=True,
    engines=("vLLM",),
    engines_with_dense=("vLLM",),
    refuse=glm4_moe.refuse,
    explain=explain,
    config=config,
    routed_fold=lambda layout: 1.0,
    ffn_tensors=glm4_moe.ffn_tensors,
    autocast=glm4_moe.AUTOCAST,
    modules=glm4_moe.TARGET.modules,
)
