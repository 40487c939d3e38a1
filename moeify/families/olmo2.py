"""OLMo 2: norms behind attention and FFN instead of before them, and norms on q and k."""

from moeify.families import Family

FAMILY = Family("olmo2")
