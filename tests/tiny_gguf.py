"""A GGUF of a small checkpoint, written by other means than moeify's: a second opinion for those who read one."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeify.export.gguf.rotation import add_rotation
from moeify.export.gguf.vocabulary import add_vocabulary
from moeify.models.config import load_config

ARCHITECTURES = {"mixtral": "llama", "granitemoeshared": "granitemoe", "qwen2_moe": "qwen2moe", "glm4_moe": "glm4moe"}
PARTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", ".bias")


def tensors_of(folder: Path, config: Any) -> dict[str, Tensor]:
    """Tensors of a checkpoint under llama.cpp's names, in float32."""
    files = sorted(folder.glob("model*.safetensors"))
    stored = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    experts: dict[str, dict[int, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for name, values in stored.items():
        layer = match[1] if (match := re.search(r"layers\.(\d+)\.", name)) else ""
        if match := re.search(r"experts\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(f"blk.{layer}.ffn_{PARTS[match[2]]}_exps.weight", {})[int(match[1])] = values
        elif "input_linear" in name:
            end = "exps" if "block_sparse_moe" in name else "shexp"
            gate, up = values.chunk(2, dim=-2)
            tensors |= {f"blk.{layer}.ffn_gate_{end}.weight": gate, f"blk.{layer}.ffn_up_{end}.weight": up}
        elif name.endswith("e_score_correction_bias"):
            tensors[f"blk.{layer}.exp_probs_b.bias"] = values
        else:
            module, _, suffix = name.rpartition(".")
            tensors[f"{names.get_name(module)}.{suffix}"] = values
    tensors |= {name: torch.stack([group[i] for i in sorted(group)]) for name, group in experts.items()}
    if config.model_type in ("mixtral", "granitemoeshared"):
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        for name in tensors:
            if count := heads.get(name.split(".")[-2]):
                tensors[name] = tensors[name].unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_gguf(
    folder: Path,
    file: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
    *,
    change: Callable[[dict[str, Tensor]], Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write one.

    Args:
        folder: of a checkpoint.
        file: where it goes.
        kind: of matrices.
        change: called with the tensors before they are written.
        metadata: values of the architecture that replace others; __ for a dot.
    """
    config = load_config(folder)
    architecture = ARCHITECTURES[config.model_type]
    tensors = tensors_of(folder, config)
    writer = gguf.GGUFWriter(file, architecture)
    tensors |= add_rotation(writer, config, architecture)
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value.value for key, value in writer.kv_data[0].items() if prefix in key}
    values |= _values(config, tensors) | {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in values.items():
        kind_of = {float: gguf.GGUFValueType.FLOAT32, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
        writer.kv_data[0][prefix + key] = gguf.gguf_writer.GGUFValue(value, kind_of[type(value)])
    add_vocabulary(writer, folder, config)
    if change:
        change(tensors)
    for name, tensor in tensors.items():
        small = tensor.ndim == 1 or name.endswith(FLOAT32)
        numbers = tensor.contiguous().numpy()
        block = gguf.GGML_QUANT_SIZES[kind][0]
        matrix = gguf.GGMLQuantizationType.F16 if numbers.shape[-1] % block else kind
        used = gguf.GGMLQuantizationType.F32 if small else matrix
        writer.add_tensor(name, gguf.quants.quantize(numbers, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _values(config: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    gate = tensors["blk.0.ffn_gate_exps.weight"]
    shared = tensors.get("blk.0.ffn_gate_shexp.weight")
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "expert_count": gate.shape[0],
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": gate.shape[1],
        "leading_dense_block_count": 0,
    }
    if shared is not None:
        values |= {
            "expert_shared_feed_forward_length": shared.shape[0],
            "expert_shared_count": shared.shape[0] // gate.shape[1],
        }
    if config.model_type == "granitemoeshared":
        values |= {
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    return values


# Tiny dense models that llama.cpp runs: which layers have a window or rotate is built in there.
AS_LLAMA_CPP_HAS_THEM: Mapping[str, Mapping[str, Any]] = {
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window_pattern": 6},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layer_interval": 4},
    "stablelm": {"use_qkv_bias": True},
}
