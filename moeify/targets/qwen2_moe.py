"""Qwen2-MoE: attention with q/k/v biases, one shared expert behind a sigmoid gate, softmax weights over all experts.

A shared gate of nearly zero gives sigmoid(0) = 1/2, so the shared down_proj is doubled. Weights are left unnormalised
because llama.cpp never normalises them for this architecture: with near-zero logits each is 1/R, undone by a factor R.
"""

from typing import Any

from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.families import GGUFFormat
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.targets import Modules, Target, carried
from moeify.targets._layout import expert_tensors, shared_tensors

# Every weight of the shared expert's gate. llama.cpp computes sigmoid(x) as silu(x) / x, which is 0 / 0 for a row of
# zeros. The smallest number of float16, which float32 and bfloat16 have too: of 122,880 hidden states of SmolLM2-135M
# (30 layers, 4,096 tokens of Moby Dick) none gives x = 0 (smallest |x| 2e-13), and 2 * sigmoid(x) is one within 1.1e-6
# (root mean square 1.2e-7), which bfloat16 and float16 round to one. 2^-20 is 1.7e-5 away.
SHARED_GATE = 2.0**-24


def refuse(dense: DenseModel, layout: Layout) -> str:
    return "" if layout.num_shared else "it always has a shared expert"


def explain(dense: DenseModel) -> str:
    attention = dense.attention
    if attention.output_bias:
        return "its attention has no bias on o"
    if attention.qk_norm:
        return "its attention has no q/k norm"
    if attention.sliding_window:
        return "its sliding window follows another rule than the dense family's"
    if not attention.has_default_head_dim:
        return "its head size is always hidden size / heads"
    return ""


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    return {
        **carried(dense),
        # Older vLLM always expects these biases, so a model without them gets zeros.
        "qkv_bias": True,
        "use_sliding_window": False,
        "intermediate_size": dense.num_neurons,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": layout.num_shared * width,
        "num_experts": layout.num_routed,
        "num_experts_per_tok": layout.num_routed_active,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(layout.dense_layers),
    }


def ffn_tensors(prefix: str, ffn: SplitFFN) -> dict[str, Tensor]:
    mlp = f"{prefix}.mlp"
    return {
        **expert_tensors(mlp, ffn),
        **shared_tensors(f"{mlp}.shared_expert", ffn),
        f"{mlp}.shared_expert_gate.weight": ffn.router_RD.new_full((1, ffn.router_RD.shape[1]), SHARED_GATE),
        f"{mlp}.gate.weight": ffn.router_RD,
    }


def extra_tensors(prefix: str, dense: DenseModel) -> dict[str, tuple[int, ...]]:
    if dense.attention.qkv_bias:
        return {}
    keys = dense.text_config.num_key_value_heads * dense.attention.head_dim
    sizes = {"q": dense.text_config.num_attention_heads * dense.attention.head_dim, "k": keys, "v": keys}
    return {f"{prefix}.self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}


def gguf_keys(config: Any) -> dict[str, int]:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }


def gguf_refuse(config: Any) -> str:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "it has experts in every layer"
    return "it never normalises the weights of experts" if config.norm_topk_prob else ""


TARGET = Target(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    preference=2,
    holds_shared=True,
    engines=("vLLM", "SGLang", "llama.cpp"),
    engines_with_dense=("vLLM", "SGLang"),
    mixings=("hard", "soft"),
    refuse=refuse,
    explain=explain,
    config=config,
    routed_fold=lambda layout: layout.num_routed,
    shared_fold=2.0,
    ffn_tensors=ffn_tensors,
    extra_tensors=extra_tensors,
    untie=True,
    gguf=GGUFFormat("qwen2moe", keys=gguf_keys, refuse=gguf_refuse),
    modules=Modules(
        experts="mlp.experts",
        router="mlp.gate",
        shared="mlp.shared_expert",
        shared_gate_up=("gate_proj", "up_proj"),
        shared_down="down_proj",
        shared_gate="mlp.shared_expert_gate",
    ),
)
