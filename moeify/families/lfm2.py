"""LFM2: short convolutions in most layers, attention with norms on q and k in the others."""

from moeify.families import Family, FFNFormat

FAMILY = Family(
    "lfm2",
    read="feed_forward",
    write="feed_forward",
    ffn=FFNFormat(up="feed_forward.w3", down="feed_forward.w2", gate="feed_forward.w1"),
    activation="silu",
    fixed={"block_auto_adjust_ff_dim": False},
    tiny={"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
)
