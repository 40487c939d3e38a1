"""GPT-2: learned positions, an FFN without a gate, biases everywhere, matrices stored the other way round."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "gpt2",
    blocks="transformer.h",
    ffn=FFNFormat(gate=None, up="mlp.c_fc", down="mlp.c_proj", transposed=True),
    activation="activation_function",
    width="n_inner",
    tiny={"n_inner": 64},
)
