"""Persimmon: norms on q and k, squared ReLU without a gate, biases."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "persimmon",
    ffn=FFNFormat(gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
)
