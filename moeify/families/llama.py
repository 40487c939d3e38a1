"""Llama 2/3.x, SmolLM2, TinyLlama, Yi: SwiGLU FFN, rotary attention."""

from moeify.families import Family, Traits

FAMILY = Family(
    model_type="llama",
    traits=lambda config: Traits(
        qkv_bias=config.attention_bias, output_bias=config.attention_bias, ffn_bias=config.mlp_bias
    ),
)
