"""Dense model families, one file each: where a family keeps its FFN and what its attention needs from a target.

To add one, copy `llama.py` under the family's `model_type`; nothing else is edited.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeify import plugins
from moeify.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Traits:
    """What a target must hold for the converted model to be exact, apart from sizes."""

    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()

    @property
    def slides_everywhere(self) -> bool:
        return self.sliding_window is not None and all(self.sliding_layers)


@dataclass(frozen=True)
class Family:
    """One dense architecture of transformers.

    Args:
        model_type: the value in config.json; also the file's name.
        traits: reads them from the config.
        gate, up, down: names of the three FFN weights, with `{layer}`.
    """

    model_type: str
    traits: Callable[[Any], Traits]
    gate: str = "model.layers.{layer}.mlp.gate_proj.weight"
    up: str = "model.layers.{layer}.mlp.up_proj.weight"
    down: str = "model.layers.{layer}.mlp.down_proj.weight"

    def ffn_names(self, layer: int) -> tuple[str, str, str]:
        return self.gate.format(layer=layer), self.up.format(layer=layer), self.down.format(layer=layer)


def window_traits(config: "PretrainedConfig") -> dict[str, Any]:
    """Sliding window of the qwen families, where `layer_types` says which layers it covers."""
    sliding = tuple(kind == "sliding_attention" for kind in config.layer_types)
    return {"sliding_window": config.sliding_window, "sliding_layers": sliding} if any(sliding) else {}


def find(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        InputError: moeify cannot split this family.
    """
    known = names()
    if model_type not in known:
        raise InputError(f"the family {model_type!r} is not supported", f"supported: {', '.join(known)}")
    family = plugins.load(__name__, model_type, "FAMILY")
    assert isinstance(family, Family)
    return family


def names() -> list[str]:
    return plugins.names(__name__)
