"""Dense model families, one file each: where the blocks are, where an FFN reads and writes, how its matrices lie.

A family says nothing of embeddings, norms, residuals, attention or heads: the stock model's own modules do that work,
and a toy twin decides which targets compute the same function (see convert/exactness.py).

To add one, copy the nearest file under the family's `model_type`; nothing else is edited.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moeify import plugins
from moeify.errors import InputError, nearest

Modality = Literal["text", "image", "audio"]
# In place of a name.
ANY = "*"

# Sizes of a tiny model, under the names that transformers' configs share; `Family.tiny` adds to them.
TINY: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# The same of a model of images: 16 patches, and what stands before them.
TINY_IMAGE: Mapping[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    **{name: TINY[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
}


# Of a model with an encoder and a decoder, as most configs call them.
TINY_PAIR: Mapping[str, Any] = {
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
}


# The same of a model that hears and writes: 32 positions of sound.
TINY_AUDIO: Mapping[str, Any] = {
    **{name: TINY[name] for name in ("vocab_size", "intermediate_size", "bos_token_id", "eos_token_id")},
    **TINY_PAIR,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "max_target_positions": 64,
}
SIZES: Mapping[Modality, Mapping[str, Any]] = {"text": TINY, "image": TINY_IMAGE, "audio": TINY_AUDIO}

# What configs call the longest text; and that of a model whose positions have no end, as T5 was trained.
POSITIONS = ("max_position_embeddings", "max_target_positions", "n_positions")
UNBOUNDED = 512


@dataclass(frozen=True)
class FFNFormat:
    """How the matrices of one FFN lie on disk, by their modules' names inside a block; biases are found by their names.

    Args:
        up, down: into the inner width and back.
        gate: what the activation is applied to; None if the FFN has no gate.
        fused: `gate` and `up` are one matrix, the gate's rows first.
        transposed: matrices are stored as (in, out), as transformers' Conv1D does.
    """

    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate: str | None = "mlp.gate_proj"
    fused: bool = False
    transposed: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules, each once."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name is not None))


# In the name of a list of blocks: any of them, in front of the module of it that its FFN lies in.
EACH = ".*."


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, numbered through all their lists.

    Args:
        lists: name of each list, and the module of a block that its FFN lies in, or "" for the block itself.
        starts: number of the first block of each.
    """

    lists: tuple[tuple[str, str], ...]
    starts: tuple[int, ...] = (0,)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the lists."""
        return tuple(name for name, _ in self.lists)

    def place(self, layer: int) -> int:
        """Which list a block is in."""
        return max(place for place, start in enumerate(self.starts) if start <= layer)

    def block(self, layer: int) -> str:
        """Name of a block, which all its tensors begin with."""
        place = self.place(layer)
        return f"{self.lists[place][0]}.{layer - self.starts[place]}"

    def site(self, layer: int) -> str:
        """Name of the module that the FFN of a block lies in; the block's where that is the block itself."""
        inside = self.lists[self.place(layer)][1]
        return f"{self.block(layer)}.{inside}" if inside else self.block(layer)


def lists_of(blocks: str | Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Lists of blocks, as `Family.blocks` names them, each with the module of a block that its FFN lies in, or ""."""
    parts = (name.partition(EACH) for name in ((blocks,) if isinstance(blocks, str) else blocks))
    return tuple((name, inside) for name, _, inside in parts)


@dataclass(frozen=True)
class Sites:
    """Where the FFNs of a list of blocks read and write.

    Args:
        blocks: name of the list of blocks.
        read, write: modules of a block, as in `Family`.
        beside: modules of a block that belong to its FFN and get the same input as `read`; they give nothing.
    """

    blocks: str
    read: str
    write: str
    beside: tuple[str, ...] = ()


def sites_of(blocks: Blocks, read: str, write: str, beside: tuple[str, ...] = ()) -> tuple[Sites, ...]:
    """Sites of each list, given modules of what an FFN lies in."""

    def sites(name: str, inside: str) -> Sites:
        places = [f"{inside}.{module}" if inside else module for module in (read, write, *beside)]
        return Sites(name, places[0], places[1], tuple(places[2:]))

    return tuple(sites(*one) for one in blocks.lists)


# What stands in a GGUF beside a key.
GGUFValue = int | float | bool | str


@dataclass(frozen=True)
class GGUFFormat:
    """What llama.cpp calls an architecture and its tensors; what the gguf package knows is not said again.

    Args:
        architecture: its name there.
        interleaved: it rotates neighbouring rows of a head's q and k, where transformers rotates halves, so that these
            rows lie in another order.
        keys: further metadata besides what every architecture has, given the config; names without the architecture's.
        names: tensors whose names the gguf package does not know: name inside a block on disk -> in the GGUF.
        halves: matrices that are two in a GGUF, the first rows and the last: module inside a block -> names.
        transposed: matrices that are stored as (in, out): modules inside a block.
        norm_offset: what the model adds to the weights of its norms; they have it in a GGUF.
        activation: the only one that it computes, by one of its names in transformers.
        windows: it has the model's sliding windows, which `keys` describe.
        rotates: positions are told by rotations; else they are learned.
        own_head: it has a head of its own; an embedding that is the head as well is written twice.
        refuse: why it cannot compute what a config says, or "".
    """

    architecture: str
    interleaved: bool = False
    keys: Callable[[Any], Mapping[str, GGUFValue]] = lambda _: {}
    names: Mapping[str, str] = field(default_factory=dict)
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    activation: str = "silu"
    windows: bool = False
    rotates: bool = True
    own_head: bool = False
    refuse: Callable[[Any], str] = lambda _: ""


@dataclass(frozen=True)
class Family:
    """One dense architecture of transformers.

    Args:
        model_type: the value in config.json; also the file's name.
        blocks: the list of blocks, by its name in the stock model; two of a model with encoder and decoder, in this
            order. Of `list.*.module` all that is said below of a block is said of this module of it.
        read, write: the module of a block whose input is the FFN's input, and the one whose output is the FFN's output;
            the same one where the FFN is a module.
        between: modules of a block that its FFN goes through between these two, where they lie in the block itself.
        auto: the Auto class of transformers that makes its models, where a config names no class with another head.
        ffn: how the matrices lie on disk.
        activation: name of the activation's field in the config; of a family whose config has none, the activation.
        width: name of the inner width's field in the config.
        narrowed: config values of the same model with another inner width, where no field says it; raises InputError
            for a width that it cannot have.
        fixed: further config values by which `width` is the inner width, whatever the model's own config makes of it.
        rotates_pairs: its attention rotates neighbouring rows of a head's q and k, where llama rotates halves.
        norm_offset: what its norms add to their weights.
        embedding_scale: what its embeddings are multiplied with, given the config.
        modality: kind of the model's inputs.
        reserved: positions that no token can have, given the config.
        gguf: how llama.cpp has it; None if it does not, or nobody has tried.
        variant: what is said otherwise of it, by the names here, given the config.
        tiny: config values of a tiny model, beside `sizes`.
        towers: of a model that reads text in a part of its own: values of its config outside of `text_config`, of a
            tiny model. What is said above is about that part, and what its own family says goes first.
        holders: stock model types that hold these towers beside experts, by the target that the part becomes; ANY for
            all of them, where it may be of any family.
    """

    model_type: str
    blocks: str | tuple[str, ...] = "model.layers"
    read: str = "mlp"
    write: str = "mlp"
    between: tuple[str, ...] = ()
    auto: str = "AutoModelForCausalLM"
    ffn: FFNFormat = field(default_factory=FFNFormat)
    activation: str = "hidden_act"
    width: str = "intermediate_size"
    narrowed: Callable[[Any, int], Mapping[str, Any]] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rotates_pairs: bool = False
    norm_offset: float = 0.0
    embedding_scale: Callable[[Any], float] = lambda config: getattr(config, "embedding_multiplier", 1.0)
    modality: Modality = "text"
    reserved: Callable[[Any], int] = lambda _: 0
    gguf: GGUFFormat | None = None
    variant: Callable[[Any], Mapping[str, Any]] = lambda _: {}
    tiny: Mapping[str, Any] = field(default_factory=dict)
    towers: Mapping[str, Any] = field(default_factory=dict)
    holders: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_pair(self) -> bool:
        """Its models have an encoder and a decoder."""
        return not isinstance(self.blocks, str)

    def holder_of(self, target: str) -> str:
        """The stock model type that holds the towers beside such experts, or ""."""
        return self.holders.get(target, self.holders.get(ANY, ""))

    def activation_of(self, config: Any) -> str:
        """The activation's name in transformers."""
        return str(getattr(config, self.activation, self.activation))

    def with_width(self, config: Any, neurons: int) -> Mapping[str, Any]:
        """Config values of the same model with so many neurons in each FFN.

        Raises:
            InputError: it cannot have so many.
        """
        return {self.width: neurons} if self.narrowed is None else self.narrowed(config, neurons)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """Sizes of a tiny model of this modality."""
        return SIZES[self.modality]

    def context_of(self, config: Any) -> int:
        """Tokens of the longest text that a model takes, or writes; 0 of one of images."""
        names = (name for name in POSITIONS if getattr(config, name, None) is not None)
        longest = getattr(config, next(names, ""), UNBOUNDED if self.is_pair else 0)
        return max(0, int(longest) - self.reserved(config))

    @property
    def tiny_values(self) -> dict[str, Any]:
        """Config values of a tiny model."""
        return {**self.sizes, **self.tiny}

    def tiny_config(self, **changes: Any) -> dict[str, Any]:
        """Config values of a tiny model of which some are changed, where its config has them."""
        values = {**self.tiny_values, **changes}
        if not self.towers:
            return values
        tied = {name: value for name, value in changes.items() if name == "tie_word_embeddings"}
        return {**self.towers, **tied, "text_config": values}


def find(model_type: str, config: Any = None) -> Family:
    """The family of a `model_type`.

    Args:
        model_type: of a dense model.
        config: of the model, where one is at hand; a family may differ by it.

    Raises:
        InputError: moeify cannot split this family.
    """
    known = names()
    if model_type not in known:
        similar = nearest(model_type, known)
        raise InputError(
            f"the family {model_type!r} is not supported" + (f", the nearest that is: {similar}" if similar else ""),
            f"`moeify inspect MODEL --draft-family` prints the file that it needs; supported: {', '.join(known)}",
        )
    family = plugins.load(__name__, model_type, "FAMILY")
    assert isinstance(family, Family)
    return family if config is None else replace(family, **family.variant(config))


# What the part that reads text says of itself, whatever it is a part of.
OF_TEXT = (
    *("read", "write", "between", "ffn", "activation", "width", "fixed"),
    *("rotates_pairs", "norm_offset", "embedding_scale"),
)


def of(config: Any) -> Family:
    """The family of a config of transformers.

    Raises:
        InputError: moeify cannot split it.
    """
    family, text = find(config.model_type, config), config.get_text_config()
    if not family.towers or (text.model_type not in names() and ANY not in family.holders):
        return family
    part = find(text.model_type)
    return replace(family, **{name: getattr(part, name) for name in OF_TEXT})


def names() -> list[str]:
    return plugins.names(__name__)
