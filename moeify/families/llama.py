"""Llama 2/3.x, SmolLM2, TinyLlama, Yi: SwiGLU FFN, rotary attention."""

from moeify.families import Family, GGUFFormat

FAMILY = Family("llama", gguf=GGUFFormat("llama", interleaved=True))
