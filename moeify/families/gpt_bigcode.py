"""GPT-BigCode (StarCoder): GPT-2 with one key for all heads, matrices stored as usual."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "gpt_bigcode",
    blocks="transformer.h",
    ffn=FFNFormat(gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    activation="activation_function",
    width="n_inner",
    tiny={"n_inner": 64},
)
