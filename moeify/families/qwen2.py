"""Qwen2 and Qwen2.5: llama with biases on q, k and v."""

from moeify.families import Family

FAMILY = Family("qwen2")
