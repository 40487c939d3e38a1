"""Granite 3: llama with factors on embeddings, attention scores, residuals and logits."""

from typing import Any

from moeify.families import Family, GGUFFormat


def gguf_factors(config: Any) -> dict[str, float]:
    """The four factors under llama.cpp's names."""
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


FAMILY = Family(
    "granite",
    gguf=GGUFFormat("granite", interleaved=True, keys=gguf_factors),
    tiny={"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0},
)
