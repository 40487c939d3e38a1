"""BERT: an encoder with learned positions and norms behind each residual, an FFN in two modules without a gate."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "bert",
    blocks="bert.encoder.layer",
    read="intermediate",
    write="output.dense",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="intermediate.dense", down="output.dense"),
)
