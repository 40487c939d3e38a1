"""GPT-2: learned positions, an FFN without a gate, biases everywhere, matrices stored the other way round."""

from typing import Any

from moeify.families import Family, FFNFormat, GGUFFormat


def gguf_refuse(config: Any) -> str:
    usual = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
    return "" if usual else "it divides scores by the root of a head's size alone, this model does not"


FAMILY = Family(
    "gpt2",
    blocks="transformer.h",
    ffn=FFNFormat(gate=None, up="mlp.c_fc", down="mlp.c_proj", transposed=True),
    activation="activation_function",
    width="n_inner",
    gguf=GGUFFormat(
        "gpt2",
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        activation="gelu_new",
        rotates=False,
        refuse=gguf_refuse,
    ),
    tiny={"n_inner": 64, "num_key_value_heads": 4},
)
