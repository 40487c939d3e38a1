"""Mistral: llama with an optional sliding window over all layers."""

from moeify.families import Family, GGUFFormat

FAMILY = Family("mistral", gguf=GGUFFormat("llama", interleaved=True), tiny={"sliding_window": None})
