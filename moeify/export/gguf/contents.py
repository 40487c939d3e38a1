"""What a GGUF is going to hold: each tensor's type and size, and where its bytes come from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from moeify.export.gguf.quantise import TYPES, encode, kind_of, num_bytes
from moeify.export.gguf.tensors import Pieces
from moeify.export.gguf.writer import Planned


@dataclass(frozen=True)
class Contents:
    """Everything that is written behind the header.

    Args:
        tensors: in the order of the file.
        type: of matrices, as `--type` has it.
        fallback: names, without the block's, of those that cannot have it.
        fallback_share: of all weights.
    """

    tensors: list[Planned]
    type: str
    fallback: tuple[str, ...]
    fallback_share: float

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
