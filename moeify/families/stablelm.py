"""StableLM 2: layer norms with biases, a rotation of a part of each head."""

from typing import Any

from moeify.families import Family, GGUFFormat


def gguf_refuse(config: Any) -> str:
    other = config.use_parallel_residual or config.qk_layernorm
    return "only models with one residual after the other and without norms on q and k are written" if other else ""


FAMILY = Family("stablelm", gguf=GGUFFormat("stablelm", own_head=True, refuse=gguf_refuse))
