"""SmolLM3: llama without a rotation in every fourth layer."""

from typing import Any

from moeify.families import Family, GGUFFormat

# llama.cpp has it built in.
INTERVAL = 4


def gguf_refuse(config: Any) -> str:
    rotated = [(layer + 1) % INTERVAL != 0 for layer in range(config.num_hidden_layers)]
    if [bool(rotates) for rotates in config.no_rope_layers] != rotated:
        return f"all layers but each {INTERVAL}th rotate there"
    return "its layers have no window there" if config.use_sliding_window else ""


FAMILY = Family(
    "smollm3",
    gguf=GGUFFormat("smollm3", interleaved=True, refuse=gguf_refuse),
    tiny={"no_rope_layer_interval": 2},
)
