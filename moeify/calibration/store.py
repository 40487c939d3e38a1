"""Arrays as long as the calibration text: in memory, or in bfloat16 on a disk, where they leave nothing behind.

    store = Store(folder)                             # Store() keeps them in memory
    outputs_TD = store.collect(pieces, num_tokens)    # an ordinary tensor, mapped from a file
    for rows in stretches(num_tokens):
        part_TD = widened(outputs_TD, rows, device)   # float32, where the arithmetic runs

A file loses its name as soon as it is mapped: its room is free again when the tensor is gone or the process is killed.
A hidden state in bfloat16 is what models that run in bfloat16 compute with.

Legend: T tokens.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from moeify.cache import disk_errors
from moeify.models.ffn import CHUNK_TOKENS

# Tokens whose products with one matrix, such as a router, are taken at once; a multiple of CHUNK_TOKENS.
STRETCH_TOKENS = 8 * CHUNK_TOKENS


class Store:
    """Makes arrays of T rows.

    Args:
        folder: where their files lie; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def collect(self, pieces: Iterable[Tensor], num_rows: int, *, exact: bool = False) -> Tensor:
        """An array of these pieces, one after another.

        Args:
            pieces: of the first rows, of those behind them, and so on.
            num_rows: of all of them.
            exact: in the type of the pieces, on a disk as well.

        Raises:
            DiskError: the disk has no room for it.
        """
        whole, first = torch.empty(0), 0
        for piece in pieces:
            if not first:
                whole = self._empty((num_rows, *piece.shape[1:]), piece, exact=exact)
            whole[first : first + len(piece)] = piece
            first += len(piece)
        assert first == num_rows, (first, num_rows)
        return whole

    def _empty(self, shape: tuple[int, ...], like: Tensor, *, exact: bool) -> Tensor:
        if self.folder is None:
            return like.new_empty(shape)
        dtype, size = like.dtype if exact else torch.bfloat16, torch.Size(shape).numel()
        with disk_errors(self.folder):
            # Its suffix lets a run that goes on sweep up what a kill at this very place leaves.
            handle, name = tempfile.mkstemp(".tmp", "tokens-", self.folder)
            try:
                # Taken at once: writing into a mapped hole that a full disk cannot fill would kill the process.
                os.posix_fallocate(handle, 0, size * dtype.itemsize)
                mapped = torch.from_file(name, shared=True, size=size, dtype=dtype)
            finally:
                os.close(handle)
                Path(name).unlink()
        return mapped.view(shape)


IN_MEMORY = Store()


def stretches(num_rows: int, step: int | None = None) -> Iterator[slice]:
    """All rows, so many at a time."""
    step = step or STRETCH_TOKENS
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def widened(array_TX: Tensor, rows: slice | Tensor, device: torch.device | None = None) -> Tensor:
    """Some rows in a type that is computed with, where it is computed; rows in memory are not copied."""
    part = array_TX[rows]
    return part.to(device or part.device, torch.float32 if part.dtype == torch.bfloat16 else part.dtype)
