"""GPT-NeoX for Japanese: a bias in attention's last matrix alone, no gate."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "gpt_neox_japanese",
    blocks="gpt_neox_japanese.layers",
    ffn=FFNFormat(gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    tiny={"intermediate_multiple_size": 2},
)
