"""Hunyuan 1: llama with norms on q and k behind the rotation."""

from moeify.families import Family, GGUFFormat

FAMILY = Family("hunyuan_v1_dense", gguf=GGUFFormat("hunyuan-dense"), tiny={"head_dim": 8})
