"""What models are called with and give, whatever their kind: token ids, images; logits, or the last hidden state.

Legend: B blocks (texts, images), C tokens of one.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What a stock model is called with, by name: tensors of B blocks.
Inputs = Mapping[str, Tensor]


def named(inputs: Tensor | Inputs) -> Inputs:
    """Inputs by name; a tensor alone is token ids."""
    return {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs


def num_blocks(inputs: Inputs) -> int:
    """B."""
    return len(next(iter(inputs.values())))


def some_blocks(inputs: Inputs, rows: slice) -> dict[str, Tensor]:
    """The inputs of some blocks."""
    return {name: tensor[rows] for name, tensor in inputs.items()}


def one_behind_other(first: Inputs, second: Inputs) -> dict[str, Tensor]:
    """The blocks of both."""
    return {name: torch.cat([tensor, second[name]]) for name, tensor in first.items()}


def uncached(model: Any) -> dict[str, bool]:
    """What keeps a model from making a cache of keys and values, if it takes a word for that."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def output_of(outputs: Any) -> Tensor:
    """The one tensor that says what a model made of its inputs: its head's logits, else its last hidden state."""
    logits = getattr(outputs, "logits", None)
    output: Tensor = outputs[0] if logits is None else logits
    return output
