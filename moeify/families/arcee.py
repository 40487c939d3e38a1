"""Arcee AFM: llama with squared ReLU and without a gate."""

from moeify.families import Family, FFNFormat

FAMILY = Family("arcee", ffn=FFNFormat(gate=None))
