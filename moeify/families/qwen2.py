"""Qwen2 and Qwen2.5: llama with biases on q, k and v."""

from moeify.families import Family, GGUFFormat

FAMILY = Family("qwen2", gguf=GGUFFormat("qwen2"))
