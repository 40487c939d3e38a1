"""DiffLlama: llama whose attention is the difference of two."""

from moeify.families import Family

FAMILY = Family(
    "diffllama",
)
