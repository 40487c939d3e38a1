"""MiniCPM 3: latent attention, factors on embeddings, residuals and logits."""

from moeify.families import Family

FAMILY = Family(
    "minicpm3",
    tiny={"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
)
