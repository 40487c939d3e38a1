"""Ernie 4.5: llama whose rotary attention turns neighbouring pairs."""

from moeify.families import Family, GGUFFormat

# Both rotate neighbouring rows: none is put elsewhere.
FAMILY = Family("ernie4_5", rotates_pairs=True, gguf=GGUFFormat("ernie4_5"), tiny={"head_dim": 8})
