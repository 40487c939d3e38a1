"""What a GGUF is going to hold: each tensor's type and size, and where its bytes come from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from moeify.export.gguf.blocks import REQUANTISED, Blocks
from moeify.export.gguf.quantise import FALLBACK, TYPES, block_size, encode, kind_of, num_bytes
from moeify.export.gguf.tensors import Pieces
from moeify.export.gguf.writer import Planned
from moeify.options import Track


@dataclass(frozen=True)
class Contents:
    """Everything that is written behind the header.

    Args:
        tensors: in the order of the file.
        type: of matrices, as `--type` has it.
        fallback: names, without the block's, of those that cannot have it.
        fallback_share: of all weights.
        raw: names of those that are blocks of the model's own GGUF.
        raw_share: of all weights.
    """

    tensors: list[Planned]
    type: str
    fallback: tuple[str, ...]
    fallback_share: float
    raw: frozenset[str] = frozenset()
    raw_share: float = 0.0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def contents(found: list[Pieces], extra: Mapping[str, Tensor], type_name: str) -> Contents:
    """Choose a type for each tensor.

    Args:
        found: tensors that are made of stored ones.
        extra: values of further ones, such as factors of a rotation.
        type_name: of matrices.
    """
    matrices = TYPES[type_name][0]
    tensors = [_given(name, values) for name, values in extra.items()] + [_planned(item, matrices) for item in found]
    fallen = [tensor for tensor in tensors if tensor.kind not in (matrices, Kind.F32)]
    names = tuple(dict.fromkeys(tensor.part for tensor in fallen))
    return Contents(tensors, type_name, names, _numbers(fallen) / _numbers(tensors))


def quantised_contents(
    found: list[Pieces], extra: Mapping[str, Tensor], blocks: Blocks, track: Track[Pieces]
) -> Contents:
    """Take blocks of the source where the checkpoint holds its numbers; the rest gets the source's types.

    Args:
        found, extra: see `contents`.
        blocks: of the source.
        track: wraps the comparison of numbers.
    """
    tensors, raw, fallen = [_given(name, values) for name, values in extra.items()], [], []
    for item in track(found, "comparing with the source", len(found)):
        planned = blocks.raw(item)
        if planned is not None:
            raw.append(planned)
        else:
            kind = blocks.kind_of(item)
            planned = Planned(item.name, item.shape, kind, num_bytes(item.shape, kind), partial(_encoded, item, kind))
            if item.shape[-1] % block_size(REQUANTISED) and kind == FALLBACK:
                fallen.append(planned)
        tensors.append(planned)
    names = tuple(dict.fromkeys(tensor.part for tensor in fallen))
    total = _numbers(tensors)
    return Contents(
        tensors,
        blocks.type,
        names,
        _numbers(fallen) / total,
        frozenset(tensor.name for tensor in raw),
        _numbers(raw) / total,
    )


def _planned(item: Pieces, matrices: Kind) -> Planned:
    kind = kind_of(item.name, item.shape, matrices)
    return Planned(item.name, item.shape, kind, num_bytes(item.shape, kind), partial(_encoded, item, kind))


def _encoded(item: Pieces, kind: Kind) -> Iterator[np.ndarray]:
    for rows in item.read():
        yield encode(item.name, rows, kind)


def _given(name: str, values: Tensor) -> Planned:
    shape = tuple(values.shape)
    return Planned(name, shape, Kind.F32, num_bytes(shape, Kind.F32), lambda: [encode(name, values[None], Kind.F32)])


def _numbers(tensors: list[Planned]) -> int:
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors)
