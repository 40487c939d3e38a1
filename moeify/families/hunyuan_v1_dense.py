"""Hunyuan 1: llama with norms on q and k behind the rotation."""

from moeify.families import Family

FAMILY = Family("hunyuan_v1_dense", tiny={"head_dim": 8})
