"""The file itself: header, names and places of tensors, then their bytes, one piece in memory at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moeify.cache import replacing
from moeify.options import Track


@dataclass(frozen=True)
class Planned:
    """One tensor that is going to be written.

    Args:
        name: in the GGUF.
        shape: of its numbers.
        kind: how they lie.
        num_bytes: that they take.
        read: yields the bytes from first to last.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    num_bytes: int
    read: Callable[[], Iterable[np.ndarray]]

    @property
    def part(self) -> str:
        """Its name without the block's number."""
        return self.name.split(".", 2)[-1] if self.name.startswith("blk.") else self.name


def write(file: Path, writer: Any, tensors: list[Planned], track: Track[Planned]) -> None:
    """Write a GGUF, which appears under its name when it is complete.

    Args:
        file: where it goes.
        writer: a gguf.GGUFWriter that has all keys; it writes the header, which names the tensors.
        tensors: in the order of the file.
        track: wraps the loop over tensors.

    Raises:
        DiskError: the disk is full or cannot be written.
    """
    for tensor in tensors:
        # The type of numbers is not looked at where that of the blocks is given.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=tensor.kind)
    with replacing(file) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            out = writer.fout[0]
            writer.write_padding(out, out.tell())
            for tensor in track(tensors, "writing tensors", len(tensors)):
                written = sum(out.write(piece.tobytes()) for piece in tensor.read())
                if written != tensor.num_bytes:
                    raise AssertionError(f"{tensor.name} has {written} bytes, announced were {tensor.num_bytes}")
                writer.write_padding(out, tensor.num_bytes)
        finally:
            writer.close()
