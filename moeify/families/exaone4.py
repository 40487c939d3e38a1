"""EXAONE 4: norms behind attention and FFN, norms on q and k, a window in three of four layers."""

from typing import Any

from moeify.families import Family, GGUFFormat


def gguf_refuse(config: Any) -> str:
    return "models of 64 layers alone have windows there" if config.sliding_window else ""


FAMILY = Family(
    "exaone4",
    gguf=GGUFFormat("exaone4", refuse=gguf_refuse),
    tiny={"sliding_window": 16, "sliding_window_pattern": 2},
)
