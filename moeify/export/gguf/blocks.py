"""The GGUF that a model was split from: blocks of numbers that a checkpoint holds unchanged, taken as they are.

A block lies along a row, and a split puts rows of gate, up and attention into another order and changes none. So these
rows stay quantised as they were, without loss; that is proven number by number, so that a source that was changed, or
a checkpoint that was trained since, is quantised anew where it differs. down_proj is cut along its rows and refit.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from moeify import families
from moeify.errors import InputError, first_line
from moeify.export.gguf.quantise import TYPES, kind_of, num_bytes
from moeify.export.gguf.tensors import PIECE_NUMBERS, Pieces, by_pairs
from moeify.export.gguf.writer import Planned
from moeify.families import GGUFFormat
from moeify.models.gguf import read_header
from moeify.plan import SHARED, SplitPlan

NAME = re.compile(r"blk\.(\d+)\.(ffn_(?:gate|up))(_exps|_shexp|)\.weight")
HEADS = re.compile(r"blk\.\d+\.attn_([qk])\.weight")
# down_proj of a source whose type llama.cpp alone writes: the smallest that keeps what those keep.
REQUANTISED = Kind.Q8_0


@dataclass(frozen=True)
class Blocks:
    """A source.

    Args:
        plan: of the split.
        form, config: of the checkpoint.
        tensors: of the source, by name.
        file_type: gguf.LlamaFileType of it.
    """

    plan: SplitPlan
    form: GGUFFormat
    config: Any
    tensors: dict[str, Any]
    file_type: int

    @classmethod
    def open(cls, file: Path, plan: SplitPlan, form: GGUFFormat, config: Any) -> "Blocks":
        """Look at a source; no block is read.

        Raises:
            InputError: it is damaged.
        """
        # With bounds; the reader below believes what it reads.
        file_type = int(read_header(file).metadata.get("general.file_type", gguf.LlamaFileType.GUESSED))
        try:
            reader = gguf.GGUFReader(file)
        except Exception as error:
            raise InputError(f"the gguf package cannot read {file}: {first_line(error)}", "fetch it again") from error
        return cls(plan, form, config, {tensor.name: tensor for tensor in reader.tensors}, file_type)

    @property
    def type(self) -> str:
        """What the source's type is called."""
        try:
            return gguf.LlamaFileType(self.file_type).name.split("_", 1)[1].lower()
        except ValueError:
            return "mixed"

    def raw(self, item: Pieces) -> Planned | None:
        """A tensor as blocks of the source; None where the checkpoint's numbers are not the source's."""
        found = self._rows(item)
        if found is None:
            return None
        tensor, order = found
        if tuple(tensor.data.shape[:-1]) != (len(tensor.data),) or not _is_same(item, tensor, order):
            return None
        kind = Kind(tensor.tensor_type)
        return Planned(item.name, item.shape, kind, num_bytes(item.shape, kind), partial(_blocks, tensor, order))

    def kind_of(self, item: Pieces) -> Kind:
        """Type of a tensor that is quantised anew: the source's, or the nearest one that can be written here."""
        block = item.name.split(".")[1] if item.name.startswith("blk.") else ""
        source = self.tensors.get(re.sub(r"_(exps|shexp)\.", ".", item.name)) or self.tensors.get(
            f"blk.{block}.ffn_down.weight"
        )
        kind = REQUANTISED if source is None else Kind(source.tensor_type)
        return kind_of(item.name, item.shape, kind if kind in {one for one, _ in TYPES.values()} else REQUANTISED)

    def _rows(self, item: Pieces) -> tuple[Any, Tensor] | None:
        """A tensor of the source, and which of its rows a tensor of the checkpoint has."""
        if len(item.shape) == 1 or kind_of(item.name, item.shape, Kind.F16) == Kind.F32:
            return None
        if cut := NAME.fullmatch(item.name):
            source = self.tensors.get(f"blk.{cut[1]}.{cut[2]}.weight")
            layer = self.plan.layers[int(cut[1])]
            experts = range(self.plan.layout.num_routed) if cut[3] == "_exps" else (SHARED,)
            order = torch.cat([layer.neurons(expert) for expert in experts])
        else:
            tied = "token_embd.weight" if item.name == "output.weight" else ""
            source = self.tensors.get(item.name) or self.tensors.get(tied)
            order = torch.arange(int(np.prod(item.shape[:-1])))
            family = families.find(self.plan.family).gguf
            if (part := HEADS.fullmatch(item.name)) and family is not None:
                order = self._paired(order, part[1], interleaved=family.interleaved)
        if source is None or int(source.shape[0]) != item.shape[-1] or int(order.max()) >= int(source.shape[1]):
            return None
        return source, order

    def _paired(self, order: Tensor, part: str, *, interleaved: bool) -> Tensor:
        """Rows of q or k where source and checkpoint order the rows of a head in two ways."""
        heads = int(self.config.num_attention_heads if part == "q" else self.config.num_key_value_heads)
        if interleaved == self.form.interleaved:
            return order
        paired = by_pairs(order, heads)
        return paired if self.form.interleaved else paired.argsort()


def _is_same(item: Pieces, tensor: Any, order: Tensor) -> bool:
    """Whether the checkpoint's rows are the source's, to the last bit of the checkpoint's type."""
    if len(order) != int(np.prod(item.shape[:-1])):
        return False
    at = 0
    for rows in item.read():
        raw = tensor.data[order[at : at + len(rows)].numpy()]
        values = torch.from_numpy(gguf.quants.dequantize(raw, tensor.tensor_type))
        if not torch.equal(values.to(rows.dtype), rows):
            return False
        at += len(rows)
    return True


def _blocks(tensor: Any, order: Tensor) -> Iterator[np.ndarray]:
    for part in order.split(max(1, PIECE_NUMBERS // int(tensor.shape[0]))):
        yield np.ascontiguousarray(tensor.data[part.numpy()]).view(np.uint8)
