"""Helium: llama whose rotary attention turns neighbouring pairs."""

from moeify.families import Family

FAMILY = Family("helium", rotates_pairs=True, tiny={"head_dim": 8})
