"""Mistral: llama with an optional sliding window over all layers."""

from moeify.families import Family

FAMILY = Family("mistral", tiny={"sliding_window": None})
