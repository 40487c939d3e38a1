"""Granite 3: llama with factors on embeddings, attention scores, residuals and logits."""

from moeify.families import Family

FAMILY = Family("granite", tiny={"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0})
