"""ELECTRA: BERT trained to find tokens that were replaced."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "electra",
    blocks="electra.encoder.layer",
    read="intermediate",
    write="output.dense",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="intermediate.dense", down="output.dense"),
)
