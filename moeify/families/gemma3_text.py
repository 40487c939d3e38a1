"""Gemma 3 (its language model, such as Gemma-3-270M): norms around attention and FFN, two rotations."""

from typing import Any

from moeify.families import Family, GGUFFormat

# llama.cpp knows the largest model by its number of layers, and divides by another size there.
LAYERS_27B = 62
# One of so many layers has no window.
PATTERN = 6


def gguf_refuse(config: Any) -> str:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    scale = config.hidden_size // heads if layers == LAYERS_27B else config.head_dim
    if config.query_pre_attn_scalar != scale:
        return f"it divides scores by the root of {scale}, this model by that of {config.query_pre_attn_scalar}"
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "it does not cap scores or logits, this model does"
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [layer % PATTERN == PATTERN - 1 for layer in range(layers)]:
        return f"one of {PATTERN} layers, the last, has no window there"
    return ""


FAMILY = Family(
    "gemma3_text",
    activation="hidden_activation",
    gguf=GGUFFormat(
        "gemma3",
        keys=lambda config: {"attention.sliding_window": int(config.sliding_window)},
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
        windows=True,
        refuse=gguf_refuse,
    ),
    tiny={
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
)
