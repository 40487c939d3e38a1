"""The dense model as stock transformers sees it: what `verify` compares with, whatever moeify's own reader says.

The split read the model through `moeify.models.dense`. A fault of that reader would be in the checkpoint and in every
comparison with it, so that here nothing of it is used but names: tensors, buffers and class are those of the loaded
model, whose loader reports what is missing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moeify.errors import InputError
from moeify.models import stock
from moeify.models.dense import DenseModel
from moeify.models.ffn import unpack
from moeify.models.heads import LABELLED, auto_name
from moeify.models.shallow import cut_model

# How much the same frequencies may differ when two classes compute them.
FREQUENCY_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Reference(DenseModel):
    """A dense model whose tensors come from the stock model, in float32.

    Args:
        model: as transformers loaded it.
        tensors: its state, by name.
    """

    model: Any
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, source: DenseModel) -> "Reference":
        """Load the stock model.

        Raises:
            InputError: transformers reports missing tensors or other shapes, or has not what moeify would read.
        """
        model = stock.load(source.path).eval()
        if source.dropped:
            cut_model(model, source.blocks.names[0], source.dropped)
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        absent = sorted(set(source.shapes) - set(tensors))
        if absent:
            raise InputError(
                f"{type(model).__name__} of transformers has no {absent[0]}, which moeify reads of it",
                "install a version of transformers that constraints.txt names",
            )
        known = {part.name: getattr(source, part.name) for part in fields(DenseModel) if part.init}
        return cls(**known, model=model, tensors=tensors)

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the stock model."""
        return {name: self.tensors[name] for name in names}

    def silence(self, layer: int, neurons: Tensor) -> None:
        """Have neurons of an FFN add nothing to its output; in the loaded model, in place."""
        tensors = self.get(self.ffn_names(layer))
        ffn = unpack(self.family.ffn, self.block(layer), tensors, layer, self.activation)
        ffn.down_DF[:, neurons[neurons < ffn.num_neurons]] = 0


@torch.no_grad()
def architecture_difference(moe: Any, dense: Any, stored: torch.dtype, *, values: bool) -> str:
    """The first fact of the architecture in which two stock models differ, or "".

    Args:
        moe: the converted model.
        dense: the dense one.
        stored: type of the converted checkpoint, to which the dense values are rounded.
        values: compare the numbers of embeddings and heads as well, which training may change.
    """
    for (name, found), expected in zip(_facts(moe).items(), _facts(dense).values(), strict=True):
        if found != expected:
            return f"{name} {found}, the dense model {expected}"
    if difference := _rotation_difference(moe, dense):
        return difference
    if not values:
        return ""
    if difference := _outside_difference(moe, dense, stored):
        return difference
    if _tied(moe) != _tied(dense):
        return "its head is tied to its embedding" if _tied(moe) else "its head is not tied to its embedding"
    return ""


def _outside_difference(moe: Any, dense: Any, stored: torch.dtype) -> str:
    ours, its = _outside(moe), _outside(dense)
    if others := sorted(set(ours) ^ set(its)):
        return f"{others[0]} is in only one of both"
    for name, tensor in ours.items():
        if not torch.equal(tensor, its[name].to(stored).to(tensor.dtype)):
            return f"its {name} is not the dense model's"
    return ""


def _outside(model: Any) -> dict[str, Tensor]:
    """What stands around the blocks: embeddings, which are named by what they are for, and every tensor of a head."""
    base, embeddings = model.base_model, {name: _embedding(model, name) for name in ("input", "output")}
    outside = {f"{name} embedding": weight.detach() for name, weight in embeddings.items() if weight is not None}
    if base is not model:
        # A head that is tied to the embedding may be stored twice.
        known = {id(tensor) for tensor in (*base.parameters(), *embeddings.values())}
        outside |= {name: own.detach() for name, own in model.named_parameters() if id(own) not in known}
    return outside


def _embedding(model: Any, name: str) -> Tensor | None:
    """The matrix of tokens at a model's beginning or end; None where it has none."""
    weight = getattr(getattr(model, f"get_{name}_embeddings")(), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _facts(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    sizes = {name: _embedding(model, name) for name in ("output", "input")}
    labels = model.config.id2label if auto_name(model.config) in LABELLED else None
    return {
        "head": auto_name(model.config),
        "vocabulary": None if sizes["output"] is None else int(sizes["output"].shape[0]),
        "embeddings": None if sizes["input"] is None else int(sizes["input"].shape[0]),
        "classes": labels,
        "layers": int(config.num_hidden_layers),
        "hidden size": int(config.hidden_size),
        "rotation": _rope(config),
    }


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters; the share of a head that is rotated is seen in the frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def _rotation_difference(moe: Any, dense: Any) -> str:
    """Frequencies and scales of the rotary embeddings as the models hold them."""
    ours, its = (
        [(name, buffer.float()) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
        for model in (moe, dense)
    )
    if len(ours) != len(its):
        return f"it has {len(ours)} sets of rotary frequencies, the dense model {len(its)}"
    for (name, found), (_, expected) in zip(ours, its, strict=True):
        same = found.shape == expected.shape and torch.allclose(found, expected, rtol=FREQUENCY_TOLERANCE, atol=0)
        if not same:
            return f"{name} is not the dense model's"
    scales = [
        [float(module.attention_scaling) for module in model.modules() if hasattr(module, "attention_scaling")]
        for model in (moe, dense)
    ]
    return "" if scales[0] == scales[1] else f"attention_scaling {scales[0]}, the dense model {scales[1]}"


def _tied(model: Any) -> bool:
    """Whether head and embedding are the same numbers, stored once or twice."""
    head, embedding = _embedding(model, "output"), _embedding(model, "input")
    return head is not None and embedding is not None and head.shape == embedding.shape and torch.equal(head, embedding)
