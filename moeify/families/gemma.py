"""Gemma: GeGLU FFN, norms that scale by one plus their weight, scaled embeddings."""

from moeify.families import Family, GGUFFormat

FAMILY = Family(
    "gemma",
    norm_offset=1.0,
    embedding_scale=lambda config: float(config.hidden_size**0.5),
    gguf=GGUFFormat("gemma", norm_offset=1.0, activation="gelu_pytorch_tanh"),
    tiny={"head_dim": 8},
)
