"""OLMo 3: olmo2 with a sliding window in three of four layers."""

from moeify.families import Family

FAMILY = Family("olmo3", tiny={"sliding_window": 16})
