"""Qwen3.5 (its language model): gated delta-net in three of four layers, gated attention in the others."""

from moeify.families import Family

FAMILY = Family(
    "qwen3_5_text",
    tiny={
        "head_dim": 8,
        "full_attention_interval": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
)
