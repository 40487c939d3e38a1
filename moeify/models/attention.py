"""Facts about a dense model's attention that a target's config has to repeat, read from its config and tensor names."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attention:
    """What a MoE architecture must be told so that its attention is the dense model's.

    Args:
        head_dim: size of a head.
        has_default_head_dim: it is the hidden size over the number of heads.
        qkv_bias, output_bias, qk_norm: whether the tensors are there.
        sliding_window: tokens; None if no layer has a window.
        sliding_layers: which layers have it.
    """

    head_dim: int
    has_default_head_dim: bool
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()

    @property
    def slides_everywhere(self) -> bool:
        return self.sliding_window is not None and all(self.sliding_layers)


def attention_of(config: Any, names: Iterable[str]) -> Attention:
    """Read the facts.

    Args:
        config: of transformers.
        names: of the model's tensors; of those in blocks, what comes behind the list of blocks.
    """
    ends = {name.partition(".")[2] for name in names}
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    sliding = (
        tuple(kind == "sliding_attention" for kind in kinds)
        if kinds
        else (window is not None,) * int(config.num_hidden_layers)
    )
    return Attention(
        head_dim=head_dim,
        has_default_head_dim=head_dim * int(config.num_attention_heads) == int(config.hidden_size),
        qkv_bias="self_attn.q_proj.bias" in ends,
        output_bias="self_attn.o_proj.bias" in ends,
        qk_norm="self_attn.q_norm.weight" in ends,
        sliding_window=window if any(sliding) else None,
        sliding_layers=sliding if any(sliding) else (),
    )
