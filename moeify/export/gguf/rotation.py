"""Rotary embeddings in a GGUF: keys that every architecture of llama.cpp reads, and factors that some have tensors for.

Read in the source of llama.cpp as of llama-cpp-python 0.3.36 (src/llama-model.cpp, src/llama-context.cpp,
src/models/*.cpp, ggml/src/ggml-cpu/ops.cpp): an architecture that has no place for a value ignores it without a word.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moeify.errors import InputError, warn
from moeify.words import listing, on_one_line

# Architectures that divide each frequency by a factor of its own, one for all texts.
WITH_FACTORS = ("granite", "granitemoe", "llama", "mistral3")
# Those with two sets of factors, for short and for long contexts.
WITH_TWO_SETS = ("granite", "granitemoe", "llama", "mistral3", "phi3")
# Those in which a part of each head may rotate; the others stop.
IN_PART = ("glm4moe", "nemotron", "phi3", "stablelm")
# Those that rotate layers with a window by a base of their own.
WITH_TWO_BASES = ("gemma3",)
FULL, SLIDING = "full_attention", "sliding_attention"
FREQS, LONG, SHORT = (
    f"{gguf.TENSOR_NAMES[tensor]}.weight"
    for tensor in (
        gguf.MODEL_TENSOR.ROPE_FREQS,
        gguf.MODEL_TENSOR.ROPE_FACTORS_LONG,
        gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT,
    )
)
# What llama.cpp's yarn has built in for these architectures, whatever a GGUF says.
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}


def add_rotation(writer: gguf.GGUFWriter, config: PretrainedConfig, architecture: str) -> dict[str, Tensor]:
    """Add how positions rotate.

    Args:
        writer: of the GGUF.
        config: of the checkpoint, checked when it was loaded.
        architecture: llama.cpp's name of it.

    Returns:
        Further tensors of the GGUF, float32, by name.

    Raises:
        InputError: llama.cpp's architecture cannot rotate so.
    """
    config = config.get_text_config()
    values, sliding = _values(config, architecture)
    if sliding:
        writer.add_float32(gguf.Keys.Rope.FREQ_BASE_SWA.format(arch=architecture), float(sliding["rope_theta"]))
    kind = str(values.get("rope_type", "default"))
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    dim = int(head_dim * (values.get("partial_rotary_factor") or 1.0))
    if dim != head_dim and architecture not in IN_PART:
        raise InputError(
            f"{dim} of {head_dim} numbers of a head rotate; llama.cpp's {architecture} rotates all",
            f"architectures that rotate a part: {listing(IN_PART)}",
        )
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(float(values["rope_theta"]))
    if kind == "default":
        return {}
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(values["factor"]))
        return {}
    if kind == "dynamic":
        warn(
            f"rotary embeddings are scaled for texts of more than {config.max_position_embeddings:,} tokens (dynamic); "
            "a GGUF cannot say so: they are as for shorter texts"
        )
        return {}
    if kind == "longrope":
        return _two_sets(writer, config, architecture, values, dim)
    if kind == "yarn" and _is_usual(values):
        _add_yarn(writer, config, values)
        return {}
    if kind in ("llama3", "yarn"):
        return _factors(writer, config, architecture, values, dim)
    raise InputError(
        f"llama.cpp has no rotary embeddings of the kind {on_one_line(kind)}",
        "llama.cpp cannot run it; transformers does",
    )


def _values(config: Any, architecture: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the config says of its rotation, and of that of layers with a window if it is another one.

    Raises:
        InputError: there are several where llama.cpp has one, or none.
    """
    values = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in values:
        return values, {}
    two = architecture in WITH_TWO_BASES and {*values} == {FULL, SLIDING}
    if two and all(one.get("rope_type", "default") == "default" for one in values.values()):
        return values[FULL], values[SLIDING]
    found = f"those of {listing(list(values))}" if values else "none"
    raise InputError(
        f"a GGUF is written of models with one kind of rotary embeddings for all layers; this has {on_one_line(found)}",
        "llama.cpp cannot run it; transformers does",
    )


def _is_usual(values: Mapping[str, Any]) -> bool:
    """Whether llama.cpp's yarn computes the same; its architectures read no other values."""
    same = all(float(values.get(name) or usual) == usual for name, usual in YARN.items())
    return same and values.get("truncate") is not False


def _add_yarn(writer: gguf.GGUFWriter, config: Any, values: Mapping[str, Any]) -> None:
    original = int(values["original_max_position_embeddings"])
    factor = float(values.get("factor") or config.max_position_embeddings / original)
    attention = ROPE_INIT_FUNCTIONS["yarn"](config)[1]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    # llama.cpp multiplies sine and cosine by this, and by the paper's own factor.
    writer.add_rope_scaling_attn_factors(float(attention) / max(1.0, 1.0 + 0.1 * math.log(factor)))


def _factors(
    writer: gguf.GGUFWriter, config: Any, architecture: str, values: Mapping[str, Any], dim: int
) -> dict[str, Tensor]:
    """Each frequency over that of the model, which transformers computes."""
    kind = values["rope_type"]
    if architecture not in WITH_FACTORS:
        raise InputError(
            f"rotary embeddings have a factor for each frequency ({kind}); llama.cpp's {architecture} has none",
            "split for --target mixtral or granitemoeshared, whose architectures there have them",
        )
    frequencies, attention = ROPE_INIT_FUNCTIONS[kind](config)
    plain = 1.0 / (values["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_rope_scaling_attn_factors(float(attention))
    return {FREQS: (plain / frequencies.double().cpu()).float()}


def _two_sets(
    writer: gguf.GGUFWriter, config: Any, architecture: str, values: Mapping[str, Any], dim: int
) -> dict[str, Tensor]:
    """Factors of short and long contexts."""
    if architecture not in WITH_TWO_SETS:
        raise InputError(
            f"rotary embeddings are scaled in two ways (longrope); llama.cpp's {architecture} has no factors for them",
            "split for --target mixtral or granitemoeshared, whose architectures there have them",
        )
    original = int(values["original_max_position_embeddings"])
    sets = {LONG: values["long_factor"], SHORT: values["short_factor"]}
    if wrong := next((f for f in sets.values() if len(f) != dim // 2), None):
        raise InputError(
            f"{len(wrong)} factors of rotary embeddings, expected {dim // 2}", "config.json is damaged: fetch it again"
        )
    warn(
        f"llama.cpp takes the factors of long texts whenever its context (-c) is above {original:,} tokens, "
        "transformers only for longer texts"
    )
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(float(ROPE_INIT_FUNCTIONS["longrope"](config)[1]))
    return {name: torch.tensor(factors, dtype=torch.float32) for name, factors in sets.items()}
