"""Gemma 2: gemma with norms around attention and FFN, capped logits, and a window in every other layer."""

from moeify.families import Family

FAMILY = Family(
    "gemma2",
    activation="hidden_activation",
    tiny={"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"},
)
