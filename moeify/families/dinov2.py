"""DINOv2: patches of an image, an FFN without a gate, biases everywhere, its output scaled before it is added."""

from typing import Any

from moeify.errors import InputError
from moeify.families import Family, FFNFormat


def _narrowed(config: Any, width: int) -> dict[str, int]:
    """The width is a whole multiple of the hidden size there."""
    if width % config.hidden_size:
        raise InputError(
            f"{width} neurons are left of each FFN, a dinov2 has a whole multiple of {config.hidden_size}",
            f"--static --experts {config.mlp_ratio} keeps such multiples",
        )
    return {"mlp_ratio": width // config.hidden_size}


FAMILY = Family(
    "dinov2",
    blocks="dinov2.encoder.layer",
    auto="AutoModel",
    ffn=FFNFormat(gate=None, up="mlp.fc1", down="mlp.fc2"),
    narrowed=_narrowed,
    modality="image",
    tiny={"mlp_ratio": 2},
)
