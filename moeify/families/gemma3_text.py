"""Gemma 3 (its language model, such as Gemma-3-270M): norms around attention and FFN, two rotations."""

from moeify.families import Family

FAMILY = Family(
    "gemma3_text",
    activation="hidden_activation",
    tiny={
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
)
