"""Granite with a window in some layers."""

from moeify.families import Family

FAMILY = Family(
    "granite_swa",
    tiny={"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0, "sliding_window": 16},
)
