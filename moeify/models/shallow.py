"""A dense model without some of its layers: the same tensors under lower numbers, and a config that has fewer.

What is left out of a stock model's list of blocks is left out of the function: a block adds to the residual stream, and
without it the stream goes on as it was. `convert/droppable.py` proves it for a model's very config.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from moeify.errors import InputError
from moeify.models.dense import DenseModel

Value = TypeVar("Value")
# Lists of a config that may be as long as the model has layers, and are about something else.
OTHER_LISTS = ("architectures", "token")


def kept_layers(num_layers: int, dropped: Sequence[int]) -> list[int]:
    """Numbers, in the whole model, of the layers that stay."""
    return [layer for layer in range(num_layers) if layer not in dropped]


def without_layers(dense: DenseModel, dropped: Sequence[int]) -> DenseModel:
    """The model without these layers; those behind them move up.

    Args:
        dense: the whole model.
        dropped: numbers of layers.

    Raises:
        InputError: there is no such layer, or none would be left.
    """
    if not dropped:
        return dense
    assert not dense.dropped, "the layers of a model are numbered as they were opened"
    if missing := [layer for layer in dropped if not 0 <= layer < dense.num_layers]:
        raise InputError(f"there is no layer {missing[0]} to drop", f"--drop-layers takes 0 to {dense.num_layers - 1}")
    kept = kept_layers(dense.num_layers, dropped)
    if not kept:
        raise InputError(f"all {dense.num_layers} layers are to be dropped", "leave a layer out of --drop-layers")
    config = copy.deepcopy(dense.config)
    cut_config(config, kept)
    stored = cut_names(dense.stored, dense.blocks.names[0], kept)
    return replace(dense, config=config, stored=stored, dropped=tuple(sorted(set(dropped))))


def cut_names(named: Mapping[str, Value], blocks: str, kept: Sequence[int]) -> dict[str, Value]:
    """What belongs to no block, and to one that stays, under the names that it has then."""
    numbers = {str(layer): number for number, layer in enumerate(kept)}
    cut = {}
    for name, value in named.items():
        layer, _, rest = name.removeprefix(f"{blocks}.").partition(".")
        if not name.startswith(f"{blocks}."):
            cut[name] = value
        elif layer in numbers:
            cut[f"{blocks}.{numbers[layer]}.{rest}"] = value
    return cut


def cut_config(config: Any, kept: Sequence[int]) -> None:
    """Leave in a config, in place, what it says of these layers."""
    config = config.get_text_config()
    num_layers = int(config.num_hidden_layers)
    values = config.to_dict()
    config.num_hidden_layers = len(kept)
    for name, value in values.items():
        is_list = isinstance(value, list | tuple) and len(value) == num_layers
        if is_list and not any(word in name for word in OTHER_LISTS):
            setattr(config, name, [value[layer] for layer in kept])


def cut_model(model: Any, blocks: str, dropped: Sequence[int]) -> None:
    """Take blocks out of a stock model in memory, in place; its names of tensors are then those of `without_layers`."""
    modules: Any = model.get_submodule(blocks)
    kept = kept_layers(len(modules), dropped)
    model.set_submodule(blocks, nn.ModuleList(modules[layer] for layer in kept))
    for number, block in enumerate(model.get_submodule(blocks)):
        for module in block.modules():
            # Its place in the cache of keys and values.
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    cut_config(model.config, kept)
