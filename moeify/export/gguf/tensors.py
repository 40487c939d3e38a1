"""From the tensors of a checkpoint's files to those of a GGUF: names, order of rows, and pieces read one at a time.

A GGUF keeps all experts of a layer in one tensor, and matrices apart that some checkpoints keep in one.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import gguf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeify.errors import InputError
from moeify.families import GGUFFormat
from moeify.models.files import Stored
from moeify.words import printable

# Number of an expert, and of a block, in a name.
EXPERT = re.compile(r"\.experts\.(\d+)\.")
BLOCK = re.compile(r"[^\d]+?\.(\d+)\.(.+)")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Numbers that are in memory at a time, in float32 and in the type they get.
PIECE_NUMBERS = 1 << 23


@dataclass(frozen=True)
class Pieces:
    """One tensor of a GGUF, made of stored ones.

    Args:
        name: in the GGUF.
        shape: of it.
        sources: stored tensors, in the order of the first axis: one, or one for each expert.
        half: 0 or 1 for the first or last half of the rows of each.
        heads: rows are those of so many heads, to be put into the order of pairs; 0 leaves them.
        transposed: the stored matrix is (in, out).
        offset: added to the values.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Stored, ...]
    half: int | None = None
    heads: int = 0
    transposed: bool = False
    offset: float = 0.0

    def read(self) -> Iterator[Tensor]:
        """Yield its rows from first to last, some at a time.

        Raises:
            InputError: a file cannot be read any more.
        """
        with ExitStack() as stack:
            opened: dict[Any, Any] = {}
            for stored in self.sources:
                try:
                    if stored.file not in opened:
                        # Closed after this tensor, so that its pages do not stay in memory.
                        opened[stored.file] = stack.enter_context(safe_open(stored.file, framework="pt"))
                    yield from self._rows(opened[stored.file].get_slice(stored.name), stored.shape)
                except (SafetensorError, OSError) as error:
                    raise InputError(
                        f"cannot read {printable(stored.name)} from {stored.file}: {error}", "make the checkpoint again"
                    ) from error

    def _rows(self, stored: Any, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """Pieces of one stored tensor, each a matrix."""
        if len(shape) == 1:
            # Sums in float32, in which norms lie in a GGUF.
            vector = stored[:].float() + self.offset if self.offset else stored[:]
            yield (by_pairs(vector, self.heads) if self.heads else vector)[None]
            return
        if self.heads:
            yield by_pairs(stored[:], self.heads)
            return
        if self.transposed:
            yield stored[:].T.contiguous()
            return
        begin, end = 0, shape[-2]
        if self.half is not None:
            begin, end = self.half * end // 2, (self.half + 1) * end // 2
        step = max(1, PIECE_NUMBERS // shape[-1])
        for expert in range(shape[0]) if len(shape) == 3 else (None,):
            for row in range(begin, end, step):
                rows = slice(row, min(row + step, end))
                yield stored[rows] if expert is None else stored[expert, rows]


def by_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of pairs that rotate together: row i of a head, then row i + half, and so on.

    Args:
        rows: of the matrix or bias, those of one head after the other.
        heads: that they belong to.
    """
    paired: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return paired


def pieces(form: GGUFFormat, config: Any, stored: Mapping[str, Stored]) -> list[Pieces]:
    """All tensors of a GGUF, in its order: those outside of blocks, then block by block.

    Args:
        form: what llama.cpp calls them.
        config: of the checkpoint.
        stored: its tensors, by name.

    Raises:
        InputError: a tensor has no name there.
    """
    groups: dict[str, dict[int, Stored]] = defaultdict(dict)
    for name, tensor in stored.items():
        expert = EXPERT.search(name)
        groups[EXPERT.sub(".experts.", name)][int(expert[1]) if expert else 0] = tensor
    names = _Names(form, int(config.num_hidden_layers))
    found = [
        _pieces(
            form, config, target, half, tuple(group[expert] for expert in sorted(group)), stacked=name not in stored
        )
        for name, group in groups.items()
        for half, target in names.of(name)
    ]
    by_name = {item.name: item for item in found}
    if form.own_head and HEAD not in by_name:
        found.append(replace(by_name[EMBEDDING], name=HEAD))
    return sorted(found, key=lambda item: _place(item.name))


def _pieces(
    form: GGUFFormat, config: Any, name: str, half: int | None, sources: tuple[Stored, ...], *, stacked: bool
) -> Pieces:
    shape = sources[0].shape
    if half is not None:
        shape = (*shape[:-2], shape[-2] // 2, shape[-1])
    heads = 0
    if form.interleaved and (part := re.search(r"\.attn_([qk])\.(weight|bias)$", name)):
        heads = int(config.num_attention_heads if part[1] == "q" else config.num_key_value_heads)
    inside = BLOCK.fullmatch(sources[0].name)
    transposed = inside is not None and len(shape) == 2 and inside[2].removesuffix(".weight") in form.transposed
    offset = form.norm_offset if name.endswith("norm.weight") else 0.0
    shape = shape[::-1] if transposed else shape
    return Pieces(name, (len(sources), *shape) if stacked else shape, sources, half, heads, transposed, offset)


class _Names:
    """What llama.cpp calls a stored tensor."""

    def __init__(self, form: GGUFFormat, num_layers: int) -> None:
        self._form = form
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form.architecture)
        self._map = gguf.get_tensor_name_map(number, num_layers)

    def of(self, name: str) -> Iterator[tuple[int | None, str]]:
        """Yield what a tensor becomes: which half of it, None for all, and the name."""
        module, _, suffix = name.rpartition(".")
        inside = BLOCK.fullmatch(name)
        if inside and inside[2] in self._form.names:
            yield None, f"blk.{inside[1]}.{self._form.names[inside[2]]}"
            return
        if inside and (halves := self._form.halves.get(inside[2].removesuffix(f".{suffix}"))):
            yield from ((half, f"blk.{inside[1]}.{part}.{suffix}") for half, part in enumerate(halves))
            return
        known = self._map.get_name(module)
        if known is None:
            raise InputError(
                f"llama.cpp's {self._form.architecture} has no place for {printable(name)}",
                "it would be lost, so nothing is written; transformers and vLLM run the checkpoint",
            )
        yield None, f"{known}.{suffix}"


def _place(name: str) -> tuple[int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]), name) if block else (-1, name)
