"""Ministral 8B: mistral with a sliding window in three of four layers."""

from moeify.families import Family

FAMILY = Family("ministral", tiny={"head_dim": 8, "sliding_window": 16})
