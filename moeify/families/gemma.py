"""Gemma: GeGLU FFN, norms that scale by one plus their weight, scaled embeddings."""

from moeify.families import Family

FAMILY = Family("gemma", tiny={"head_dim": 8})
