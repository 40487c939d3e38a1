"""Jais 2: llama with layer norms and squared ReLU without a gate, biases everywhere."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "jais2",
    ffn=FFNFormat(gate=None),
)
