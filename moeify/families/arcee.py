"""Arcee AFM: llama with squared ReLU and without a gate."""

from moeify.families import Family, FFNFormat, GGUFFormat

FAMILY = Family("arcee", ffn=FFNFormat(gate=None), gguf=GGUFFormat("arcee", interleaved=True, activation="relu2"))
