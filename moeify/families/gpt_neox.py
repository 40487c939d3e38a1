"""GPT-NeoX and Pythia: attention and FFN beside each other, no gate, biases everywhere."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "gpt_neox",
    blocks="gpt_neox.layers",
    ffn=FFNFormat(gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
)
