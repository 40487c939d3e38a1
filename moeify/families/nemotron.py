"""Nemotron and Minitron: squared ReLU without a gate, layer norms that scale by one plus their weight."""

from moeify.families import Family, FFNFormat, GGUFFormat

FAMILY = Family(
    "nemotron",
    ffn=FFNFormat(gate=None),
    gguf=GGUFFormat("nemotron", norm_offset=1.0, activation="relu2", own_head=True),
)
