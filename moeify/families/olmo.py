"""OLMo 1: llama whose layer norms have no weights."""

from moeify.families import Family

FAMILY = Family("olmo")
