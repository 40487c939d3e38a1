"""HyperCLOVA X SEED: llama with the factors of granite, and norms behind attention and FFN."""

from moeify.families import Family

FAMILY = Family("hyperclovax", tiny={"residual_multiplier": 0.5, "embedding_multiplier": 2.0})
