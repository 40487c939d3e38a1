"""EXAONE 4: norms behind attention and FFN, norms on q and k, a window in three of four layers."""

from moeify.families import Family

FAMILY = Family("exaone4", tiny={"sliding_window": 16, "sliding_window_pattern": 2})
