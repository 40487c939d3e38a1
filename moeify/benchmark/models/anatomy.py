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
from moeify.models.heads import check_language_model, config_of_experts

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
    """

    layers: tuple[int, ...]
    num_routed: int
    num_chosen: int
    parameters_each: int
    matrices_each: int
    num_shared: int
    chosen_by_layer: tuple[int, ...] = ()

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
        chosen = sum(self.chosen_by_layer) or len(self.layers) * self.num_chosen
        return len(self.layers) * self.num_routed - chosen


@dataclass(frozen=True)
class Anatomy:
    """One architecture with its sizes.

    Args:
        model_type: of transformers.
        num_layers: decoder layers.
        vocab_size, hidden_size: V and D.
        tied: the head is the embedding.
        position_width: numbers that a learned position adds to a token; none where positions rotate.
        parts: by moeify.benchmark.model_results.PARTS.
        experts: None for a dense model.
        windows: of each attention layer, how far back it sees; None for everything.
        query_width, kv_width: H * d, and keys and values of one position in one layer.
    """

    model_type: str
    num_layers: int
    vocab_size: int
    hidden_size: int
    tied: bool
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
    check_language_model(config, "a benchmark")
    model = empty_model(config, buffers=False)
    whole, config = config, config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return Anatomy(
        model_type=config.model_type,
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        tied=head is not None and head.weight is embedding,
        position_width=sum(table.embedding_dim for table in _tables(model)),
        parts=_parts(model),
        experts=_experts(model, config_of_experts(whole)),
        windows=_windows(model, config),
        query_width=heads * head_dim,
        kv_width=2 * int(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
    )


def experts_modules(model: nn.Module) -> dict[int, Any]:
    """The module with the routed experts of every layer that has one, by the layer's index.

    It is called with hidden states, chosen experts and their weights.
    """
    return {layer_of(name): module for name, module in model.named_modules() if hasattr(module, "has_gate")}


def layer_of(name: str) -> int:
    """The decoder layer that a module belongs to: the first number in its name."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    assert found is not None, f"{name} is in no layer"
    return int(found[1])


def _parts(model: Any) -> dict[str, Count]:
    totals: dict[str, list[int]] = {}
    routers = _router_modules(model)
    for name, parameter in model.named_parameters():
        path = name.split(".")[:-1]
        owners = [model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path) + 1)]
        total = totals.setdefault(_part(model, parameter, owners, routers), [0, 0])
        total[0] += parameter.numel()
        # The biases of experts are a matrix, by which nothing is multiplied.
        total[1] += parameter.numel() if parameter.ndim > 1 and not name.endswith("bias") else 0
    return {part: Count(*total) for part, total in totals.items()}


def _part(model: Any, parameter: nn.Parameter, owners: list[nn.Module], routers: list[nn.Module]) -> str:
    """Which part a parameter is of; `owners` are the modules that hold it, the innermost last."""
    names = [type(owner).__name__ for owner in owners]
    head = model.get_output_embeddings()
    if isinstance(owners[-1], nn.Embedding):
        return "embedding" if owners[-1] is model.get_input_embeddings() else "positions"
    if head is not None and owners[-1] is head:
        return "head"
    if any(owner is router for owner in owners for router in routers):
        return "router"
    if parameter.ndim == 1 and "Norm" in names[-1]:
        return "norm"
    return "attention" if any(name.endswith(MIXERS) for name in names) else "ffn"


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
    layers = [layer_of(name) for name, module in model.named_modules() if type(module).__name__.endswith("Attention")]

    def slides(layer: int) -> bool:
        return window is not None and (kinds is None or kinds[layer] == "sliding_attention")

    return tuple(window if slides(layer) else None for layer in layers)
