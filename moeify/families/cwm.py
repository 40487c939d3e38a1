"""CWM (Code World Model): llama with a window in three of four layers."""

from moeify.families import Family

FAMILY = Family(
    "cwm",
    tiny={"head_dim": 8, "sliding_window": 16},
)
