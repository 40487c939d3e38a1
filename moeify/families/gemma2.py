"""Gemma 2: gemma with norms around attention and FFN, capped logits, and a window in every other layer."""

from typing import Any

from moeify.families import Family, GGUFFormat, GGUFValue

# llama.cpp knows the largest model by its number of layers, and divides by another size there.
LAYERS_27B = 46


def gguf_keys(config: Any) -> dict[str, GGUFValue]:
    return {
        "attention.sliding_window": int(config.sliding_window),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def gguf_refuse(config: Any) -> str:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    scale = config.hidden_size // heads if layers == LAYERS_27B else config.head_dim
    if config.query_pre_attn_scalar != scale:
        return f"it divides scores by the root of {scale}, this model by that of {config.query_pre_attn_scalar}"
    if not (config.attn_logit_softcapping and config.final_logit_softcapping):
        return "it caps scores and logits, this model does not"
    if any((kind == "sliding_attention") != (layer % 2 == 0) for layer, kind in enumerate(config.layer_types)):
        return "every other layer has a window there, the first one too"
    return ""


FAMILY = Family(
    "gemma2",
    activation="hidden_activation",
    gguf=GGUFFormat(
        "gemma2", keys=gguf_keys, norm_offset=1.0, activation="gelu_pytorch_tanh", windows=True, refuse=gguf_refuse
    ),
    tiny={"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"},
)
