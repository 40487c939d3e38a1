"""The teacher: the dense model's final hidden states for each block, computed when needed or kept on disk.

The file holds what the last linear map is given, D float16 numbers a token, not V logits: one matrix product with
the teacher's LM head, which stays in memory, gives the logits back. For SmolLM2-135M that is 1.2 kB a token where
logits in bfloat16 take 98 kB. Rounding to float16 changes its distribution by a divergence of about 1e-6.

Legend: B blocks of C tokens, D hidden size, V vocabulary.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moeify.cache import cache_dir, digest, intact, made_once
from moeify.check.evaluate import load
from moeify.errors import InputError
from moeify.models.dense import DenseModel
from moeify.options import Track
from moeify.resources import check_room
from moeify.training.logits import Head, reading

CACHE_FILE = "hidden.npy"
LARGEST = float(np.finfo(np.float16).max)


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of token ids, each with the teacher's hidden states if those are on disk.

    Args:
        ids_BC: int64.
        hidden_BCD: float16, on disk.
    """

    def __init__(self, ids_BC: Tensor, hidden_BCD: "np.ndarray[Any, np.dtype[np.float16]] | None" = None) -> None:
        self.ids_BC, self._hidden_BCD = ids_BC, hidden_BCD

    def __len__(self) -> int:
        return len(self.ids_BC)

    @property
    def block_tokens(self) -> int:
        return self.ids_BC.shape[1]

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        item = {"input_ids": self.ids_BC[block]}
        if self._hidden_BCD is not None:
            item["teacher"] = torch.from_numpy(self._hidden_BCD[block].copy())
        return item


class Teacher:
    """Gives the targets of training.

    Args:
        model: the dense model, in inference mode; None if all its hidden states are on disk.
        head: what makes logits of its final hidden states.
    """

    def __init__(self, model: Any, head: Head) -> None:
        self._model, self.head = model, head

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, Tensor], *, layers: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """hidden_BCD in front of the last linear map and, with `layers`, after the embedding and every layer."""
        if "teacher" in inputs:
            return inputs["teacher"], ()
        with reading(self._model.get_output_embeddings()) as read:
            out = self._model(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=layers)
        return read[0], tuple(out.hidden_states) if layers else ()


def open_teacher(
    dense: DenseModel,
    texts: list[Tensor],
    *,
    device: str,
    half: bool,
    cached: bool,
    first: bool,
    wait: Any,
    track: Track[Any],
) -> tuple[Teacher, list[Blocks]]:
    """The teacher, and every text with its hidden states where those are on disk.

    Args:
        dense: the model.
        texts: ids_BC of the training and of the evaluation text.
        device: where it runs.
        half: in bfloat16.
        cached: write its hidden states to disk, or use those that are there.
        first: this process writes them; the others `wait`.
        track: shows the progress of that.

    Raises:
        InputError: hidden states are beyond the range of float16, or the cache cannot be written.
    """
    model = load(str(dense.path), dtype="bfloat16" if half else "float32", device=device).requires_grad_(False)
    head = Head.of(model)
    if not cached:
        return Teacher(model, head), [Blocks(ids_BC) for ids_BC in texts]
    stored = []
    for ids_BC in texts:
        file = cache_dir() / f"teacher-{digest(ids_BC.numpy(), dense.fingerprint(), half)[:16]}" / CACHE_FILE
        if first and intact(file, _read) is None:
            # None, or one that lost its end.
            shutil.rmtree(file.parent, ignore_errors=True)
            with made_once(file.parent) as partial:
                _write(model, head, ids_BC, partial / CACHE_FILE, track)
                dense.check_unchanged()
        wait()
        stored.append(Blocks(ids_BC, _read(file)))
    return Teacher(None, head), stored


def _read(file: Path) -> "np.ndarray[Any, np.dtype[np.float16]]":
    hidden_BCD: np.ndarray[Any, np.dtype[np.float16]] = np.load(file, mmap_mode="r")
    return hidden_BCD


@torch.no_grad()
def _write(model: Any, head: Head, ids_BC: Tensor, file: Path, track: Track[Any]) -> None:
    """Write plainly, not through mapped memory, in which a disk that is full kills the process."""
    shape = (*ids_BC.shape, head.weight_VD.shape[1])
    check_room(file.parent, math.prod(shape) * np.dtype(np.float16).itemsize)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
    with file.open("wb") as opened:
        np.lib.format.write_array_header_1_0(opened, header)
        for block in track(range(len(ids_BC)), "asking the teacher", len(ids_BC)):
            ids_1C = ids_BC[block : block + 1].to(model.device)
            with reading(model.get_output_embeddings()) as read:
                model(input_ids=ids_1C, use_cache=False)
            hidden_CD = read[0][0]
            if not hidden_CD.abs().max() <= LARGEST:
                largest = float(hidden_CD.abs().max())
                raise InputError(
                    f"the teacher's hidden states reach {largest:.0f}, float16 ends at {LARGEST:.0f}",
                    "leave --cache-teacher out",
                )
            opened.write(hidden_CD.float().cpu().numpy().astype(np.float16).tobytes())
