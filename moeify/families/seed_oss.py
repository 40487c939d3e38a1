"""Seed-OSS: llama with biases on q, k and v."""

from moeify.families import Family, GGUFFormat

FAMILY = Family("seed_oss", gguf=GGUFFormat("seed_oss"), tiny={"head_dim": 8})
