"""VaultGemma: gemma 2 without the norms behind attention and FFN."""

from moeify.families import Family

FAMILY = Family(
    "vaultgemma",
    activation="hidden_activation",
    tiny={"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
)
