"""OLMo 2: norms behind attention and FFN instead of before them, and norms on q and k."""

from moeify.families import Family, GGUFFormat

FAMILY = Family("olmo2", gguf=GGUFFormat("olmo2", own_head=True))
