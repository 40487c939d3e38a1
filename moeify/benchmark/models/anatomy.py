"""What a model is made of: its parameters by part, its experts and its attention, read from the stock model's modules.

No weight is loaded: the model is built on the meta device. Experts are found where transformers itself finds them (the
modules that take an `experts_implementation`), so checkpoints that moeify did not make work as well.

Legend: D hidden size, E routed experts of a layer, K of them chosen for a token, H query heads, d their size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeify.errors import InputError
from moeify.models.config import empty_model
from moeify.models.heads import (
    GENERATING,
    LANGUAGE_MODELS,
    MASKED_MODEL,
    auto_name,
    check_language_model,
    config_of_experts,
    modality_of,
)

# Whose heads say something of every position; those of other models without text to write, of a whole example.
EVERYWHERE = (MASKED_MODEL, "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
# What is benchmarked besides language models: one pass over examples.
EXAMPLE_MODALITIES = ("text", "image")
NORMS = ("Norm", "LayerScale")
# What multiplies outside of blocks.
MATRICES = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
# The number of a block in a module's name.
LAYER = re.compile(r"\.(\d+)\.")
# Ends of class names that say what mixes tokens; whatever else is in a layer is its FFN.
MIXERS = ("Attention", "Mamba", "Mamba2Mixer", "Mixer", "GatedDeltaNet")


@dataclass(frozen=True)
class Count:
    """Parameters of one part: all of them, and those in matrices that tokens are multiplied with."""

    parameters: int
    matrices: int


@dataclass(frozen=True)
class Experts:
    """The routed experts, the same in all layers that have any.

    Args:
        layers: indices of these layers.
        num_routed, num_chosen: E and K.
        parameters_each, matrices_each: of one expert of one layer, with biases and without.
        num_shared: how many times wider than one expert the always-on part beside them is; one if that is no whole
            number, none if there is no such part.
        chosen_by_layer: K of each of these layers, where that differs; `num_chosen` is their mean then, rounded.
        mean_chosen: what tokens of a text had, where that is a token's own; `num_chosen` is the most then.
    """

    layers: tuple[int, ...]
    num_routed: int
    num_chosen: int
    parameters_each: int
    matrices_each: int
    num_shared: int
    chosen_by_layer: tuple[int, ...] = ()
    mean_chosen: float | None = None

    @property
    def routed_parameters(self) -> int:
        """Of all routed experts of all layers."""
        return len(self.layers) * self.num_routed * self.parameters_each

    @property
    def idle_parameters(self) -> int:
        """Of the experts that a token does not use."""
        return self._idle * self.parameters_each

    @property
    def idle_matrices(self) -> int:
        """The same without biases."""
        return self._idle * self.matrices_each

    @property
    def _idle(self) -> int:
        if self.mean_chosen is not None:
            return round(len(self.layers) * (self.num_routed - self.mean_chosen))
        chosen = sum(self.chosen_by_layer) or len(self.layers) * self.num_chosen
        return len(self.layers) * self.num_routed - chosen


@dataclass(frozen=True)
class Anatomy:
    """One architecture with its sizes.

    Args:
        model_type: of transformers.
        num_layers: of blocks.
        vocab_size, hidden_size: V and D; no V of a model of images.
        looks_up: the embedding is a table of tokens; else it is computed, as patches of images are.
        tied: the head is the embedding.
        head_everywhere: the head says something of every position, not of the last one or of an example.
        both_ways: a position sees those behind it too.
        position_width: numbers that a learned position adds to a token; none where positions rotate.
        parts: by moeify.benchmark.model_results.PARTS.
        experts: None for a dense model.
        windows: of each attention layer, how far it sees; None for everything.
        query_width, kv_width: H * d, and keys and values of one position in one layer.
    """

    model_type: str
    num_layers: int
    vocab_size: int
    hidden_size: int
    looks_up: bool
    tied: bool
    head_everywhere: bool
    both_ways: bool
    position_width: int
    parts: Mapping[str, Count]
    experts: Experts | None
    windows: tuple[int | None, ...]
    query_width: int
    kv_width: int

    @property
    def num_parameters(self) -> int:
        return sum(count.parameters for count in self.parts.values())


def anatomy(config: Any) -> Anatomy:
    """Take a model apart.

    Args:
        config: of transformers.

    Raises:
        InputError: transformers cannot build it, or its layers have experts of different sizes.
    """
    writes = writes_text(config)
    model = empty_model(config, buffers=False)
    whole, config = config, config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    table, head = _token_table(model), model.get_output_embeddings()
    return Anatomy(
        model_type=config.model_type,
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size) if table is not None else 0,
        hidden_size=int(config.hidden_size),
        looks_up=table is not None,
        tied=table is not None and head is not None and head.weight is table.weight,
        head_everywhere=not writes and auto_name(whole) in EVERYWHERE,
        both_ways=not writes,
        position_width=sum(one.embedding_dim for one in _tables(model)),
        parts=_parts(model, writes=writes),
        experts=_experts(model, config_of_experts(whole)),
        windows=_windows(model, config),
        query_width=heads * head_dim,
        kv_width=2 * int(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
    )


def writes_text(config: Any) -> bool:
    """Whether a model is a language model; an encoder of text or images is benchmarked on one pass over examples.

    Raises:
        InputError: it is neither.
    """
    name = auto_name(config)
    if name in LANGUAGE_MODELS:
        return True
    if modality_of(config) not in EXAMPLE_MODALITIES or name in GENERATING:
        check_language_model(config, "a benchmark of anything but an encoder of text or images")
    return False


def experts_modules(model: nn.Module) -> dict[int, Any]:
    """The module with the routed experts of every layer that has one, by the layer's index.

    It is called with hidden states, chosen experts and their weights.
    """
    return {layer_of(name): module for name, module in model.named_modules() if hasattr(module, "has_gate")}


def layer_of(name: str) -> int:
    """The decoder layer that a module belongs to: the first number in its name."""
    found = LAYER.search(f".{name}.")
    assert found is not None, f"{name} is in no layer"
    return int(found[1])


def _parts(model: Any, *, writes: bool) -> dict[str, Count]:
    totals: dict[str, list[int]] = {}
    routers, below, table, head = _router_modules(model), True, _token_table(model), model.get_output_embeddings()
    # An encoder's table of tokens is multiplied with where it is the head as well.
    aside = () if writes or table is None or (head is not None and head.weight is table.weight) else (table.weight,)
    for name, parameter in model.named_parameters():
        path = name.split(".")[:-1]
        owners = [model, *(model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path) + 1))]
        in_block = LAYER.search(f".{name}.") is not None
        below = below and not in_block
        # Language models differ in what lies where; in encoders the order tells what is below the blocks and above.
        outside = "" if writes or in_block else "embedding" if below else "head"
        place = _Place(name, parameter, owners, outside)
        total = totals.setdefault(_part(model, place, routers), [0, 0])
        total[0] += parameter.numel()
        # The biases of experts are a matrix, by which nothing is multiplied; so are positions and class tokens.
        is_matrix = parameter.ndim > 1 and not name.endswith("bias")
        multiplies = not outside or isinstance(owners[-1], (*MATRICES, nn.Embedding))
        multiplies = is_matrix and multiplies and not any(parameter is one for one in aside)
        total[1] += parameter.numel() if multiplies else 0
    return {part: Count(*total) for part, total in totals.items()}


@dataclass(frozen=True)
class _Place:
    """Where a parameter is.

    Args:
        name, parameter: it.
        owners: modules that hold it, the innermost last.
        outside: the part that it is of where it lies in no block of an encoder; "" elsewhere.
    """

    name: str
    parameter: nn.Parameter
    owners: list[nn.Module]
    outside: str


def _part(model: Any, place: _Place, routers: list[nn.Module]) -> str:
    """Which part a parameter is of."""
    owners = place.owners
    kinds = [type(owner).__name__ for owner in owners]
    head = model.get_output_embeddings()
    if isinstance(owners[-1], nn.Embedding):
        return "embedding" if owners[-1] is model.get_input_embeddings() else "positions"
    if head is not None and owners[-1] is head:
        return "head"
    if any(owner is router for owner in owners for router in routers):
        return "router"
    if place.parameter.ndim == 1 and any(kind in kinds[-1] for kind in NORMS):
        return "norm"
    if place.outside:
        return "positions" if "position" in place.name.rpartition(".")[2] else place.outside
    return "attention" if any(kind.endswith(MIXERS) for kind in kinds) else "ffn"


def _token_table(model: Any) -> nn.Embedding | None:
    """None of a model that looks no tokens up."""
    embedding = model.get_input_embeddings()
    return embedding if isinstance(embedding, nn.Embedding) else None


def _tables(model: Any) -> list[nn.Embedding]:
    """Of positions: whatever is looked up besides tokens."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [table for table in tables if table is not model.get_input_embeddings()]


def _router_modules(model: nn.Module) -> list[nn.Module]:
    """Beside experts, whatever turns a token into a score for each of them, or into the weight of a shared expert."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "has_gate"):
            num_experts = _num_experts(module)
            for child in model.get_submodule(name.rpartition(".")[0]).children():
                weight = getattr(child, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] in (num_experts, 1):
                    found.append(child)
    return found


def _num_experts(module: nn.Module) -> int:
    return int(next(module.parameters()).shape[0])


def _experts(model: nn.Module, config: Any) -> Experts | None:
    modules = experts_modules(model)
    if not modules:
        return None
    chosen = getattr(config, "num_experts_per_tok", None)
    if not chosen:
        raise InputError(
            f"the config of {config.model_type} does not say how many experts a token uses",
            "only models whose config has num_experts_per_tok are measured",
        )
    sizes = {(_num_experts(module), _numbers(module), _numbers(module, ndim=3)) for module in modules.values()}
    if len(sizes) > 1:
        raise InputError(
            f"the layers of this {config.model_type} have experts of different sizes: {sorted(sizes)}",
            "only models with experts of one size are measured",
        )
    ((num_routed, parameters, matrices),) = sizes
    each = matrices // num_routed
    first = min(modules)
    shared = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        # A shared expert's gate is one row.
        if re.search(rf"\.{first}\..*shared", name) and parameter.ndim == 2 and parameter.shape[0] > 1
    )
    num_shared = shared // each if shared % each == 0 else 1
    layers = tuple(sorted(modules))
    by_layer = getattr(config, "num_experts_per_tok_by_layer", None) or ()
    by_layer = tuple(int(by_layer[layer]) for layer in layers) if by_layer else ()
    chosen = round(sum(by_layer) / len(by_layer)) if by_layer else int(chosen)
    return Experts(layers, num_routed, chosen, parameters // num_routed, each, num_shared, by_layer)


def _numbers(module: nn.Module, ndim: int | None = None) -> int:
    """Parameters of a module, of all shapes or of one."""
    return sum(parameter.numel() for parameter in module.parameters() if ndim in (None, parameter.ndim))


def _windows(model: nn.Module, config: Any) -> tuple[int | None, ...]:
    """One entry an attention layer."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    attentions = [name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]
    # One may lie in another; what pools positions lies outside of the blocks.
    layers = dict.fromkeys(layer_of(name) for name in attentions if LAYER.search(f".{name}."))

    def slides(layer: int) -> bool:
        return window is not None and (kinds is None or kinds[layer] == "sliding_attention")

    return tuple(window if slides(layer) else None for layer in layers)
