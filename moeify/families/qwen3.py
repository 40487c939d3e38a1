"""Qwen3: llama with a norm on the q and k of every head, and optional attention biases."""

from moeify.families import Family, GGUFFormat

FAMILY = Family("qwen3", gguf=GGUFFormat("qwen3"), tiny={"head_dim": 8})
