"""Ernie 4.5: llama whose rotary attention turns neighbouring pairs."""

from moeify.families import Family

FAMILY = Family("ernie4_5", rotates_pairs=True, tiny={"head_dim": 8})
