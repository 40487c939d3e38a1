"""Qwen3: llama with a norm on every head's q and k, and optional attention biases."""

from moeify.families import Family, Traits, window_traits

FAMILY = Family(
    model_type="qwen3",
    traits=lambda config: Traits(
        qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=True, **window_traits(config)
    ),
)
