"""Qwen2 and Qwen2.5: llama with biases on q, k and v."""

from moeify.families import Family, Traits, window_traits

FAMILY = Family(
    model_type="qwen2",
    traits=lambda config: Traits(qkv_bias=True, **window_traits(config)),
)
