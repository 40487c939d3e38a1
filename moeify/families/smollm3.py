"""SmolLM3: llama without a rotation in every fourth layer."""

from moeify.families import Family

FAMILY = Family("smollm3", tiny={"no_rope_layer_interval": 2})
