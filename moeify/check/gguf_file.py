"""A GGUF that was written of a checkpoint, read with the gguf package alone; and how its numbers compare with others.

Legend: F neurons, D hidden size, B bytes of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from moeify.errors import InputError, first_line
from moeify.models.gguf import Header, read_header
from moeify.words import listing, on_one_line

# Architecture in a GGUF -> target that it is written of, and whether it rotates neighbouring rows of q and k.
ARCHITECTURES: Mapping[str, tuple[str, bool]] = {
    "glm4moe": ("glm4_moe", False),
    "granitemoe": ("granitemoeshared", True),
    "llama": ("mixtral", True),
    "qwen2moe": ("qwen2_moe", False),
    "qwen3moe": ("qwen3_moe", False),
}
FLOATS = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
# What the gguf package rounds to as llama.cpp does.
ROUNDED = (
    *FLOATS,
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.Q4_0,
    gguf.GGMLQuantizationType.Q4_1,
    gguf.GGMLQuantizationType.Q5_0,
    gguf.GGMLQuantizationType.Q5_1,
)
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Args:
        kind: how its numbers lie.
        shape: as in PyTorch, the last axis lies together.
        rows: its bytes, a matrix with a row for each of the tensor's.
    """

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray

    def numbers(self) -> Tensor:
        """In float32, a row for each."""
        if self.kind == gguf.GGMLQuantizationType.F32:
            return torch.from_numpy(self.rows.copy()).view(torch.float32)
        return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(self.rows, self.kind)))

    def holds(self, values: Tensor) -> bool:
        """Whether these are the values, rounded to its type; or exactly they, when they were made of such a file."""
        values = values.reshape(-1, self.shape[-1])
        if values.shape[0] != self.rows.shape[0]:
            return False
        return np.array_equal(encoded(values, self.kind), self.rows) or torch.equal(self.numbers(), values.float())


class GGUFFile:
    """A file whose header was read with bounds."""

    def __init__(self, file: Path) -> None:
        """Open it.

        Raises:
            InputError: it is damaged, or not of a MoE architecture that is written here.
        """
        self.file = file
        self.header: Header = read_header(file)
        try:
            reader = gguf.GGUFReader(file)
            self.fields: Mapping[str, Any] = reader.fields
            self.tensors = {tensor.name: _stored(tensor) for tensor in reader.tensors}
        except Exception as error:
            # A damaged file: the reader raises whatever its parser stumbles over.
            raise InputError(f"the gguf package cannot read {file}: {first_line(error)}", "export it again") from error
        self.architecture = self.header.architecture
        if self.architecture not in ARCHITECTURES or not self.own("expert_count"):
            raise InputError(
                f"{file} is a {on_one_line(self.architecture)} with {self.own('expert_count') or 'no'} experts; "
                f"expected one of {listing(list(ARCHITECTURES))} with experts",
                "`moeify export` writes such files of what `moeify split` wrote",
            )
        self.target, self.is_interleaved = ARCHITECTURES[self.architecture]
        other = sorted({tensor.kind.name for tensor in self.tensors.values() if tensor.kind not in ROUNDED})
        if other:
            raise InputError(
                f"{file} holds numbers of type {listing(other)}, which llama-quantize alone rounds to",
                "verify the f16 file that it was made of, and measure this one: llama-perplexity",
            )

    def own(self, key: str, default: Any = None) -> Any:
        """A value of the architecture."""
        return self.header.own.get(key, default)

    @property
    def width_key(self) -> str:
        """Where the architecture says how wide a routed expert is."""
        own = self.architecture in ("granitemoe", "llama")
        return "feed_forward_length" if own else "expert_feed_forward_length"

    @cached_property
    def num_layers(self) -> int:
        return len({name.split(".")[1] for name in self.tensors if name.startswith("blk.")})

    def get(self, layer: int, name: str) -> Stored | None:
        """A matrix of a block."""
        return self.tensors.get(f"blk.{layer}.{name}.weight")


def _stored(tensor: Any) -> Stored:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    data = np.ascontiguousarray(tensor.data)
    rows = data.reshape(-1, data.shape[-1]).view(np.uint8)
    return Stored(tensor.tensor_type, shape, rows)


def encoded(values: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Bytes of a matrix in a type."""
    numbers = np.ascontiguousarray(values.float().numpy())
    if kind == gguf.GGMLQuantizationType.F32:
        return numbers.view(np.uint8)
    rows: np.ndarray = gguf.quants.quantize(numbers, kind)
    return rows.view(np.uint8)


def digests(*parts_FB: np.ndarray) -> list[bytes]:
    """One for the rows of each neuron."""
    return [
        blake2b(b"".join(part[neuron].tobytes() for part in parts_FB), digest_size=DIGEST_BYTES).digest()
        for neuron in range(parts_FB[0].shape[0])
    ]
