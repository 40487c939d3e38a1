"""What an export wrote; needs no gguf package."""

from dataclasses import dataclass
from pathlib import Path

from moeify.readable import Readable


@dataclass(frozen=True, repr=False)
class ExportResult(Readable):
    """A GGUF file.

    Args:
        file: the GGUF.
        model: the checkpoint, as it was named.
        dense: the model that it was split from; "" if it is none of moeify's.
        architecture: in llama.cpp's words.
        type: of its matrices.
        num_bytes: of the file.
        num_entries: tensors in it.
        fallback: tensors of another type than `type`, because their rows are no whole blocks; of all layers once.
        fallback_share: of all weights.
        num_raw: tensors that are the blocks of the GGUF that the model was split from, bit by bit.
        raw_share: of all weights.
    """

    file: Path
    model: str
    dense: str
    architecture: str
    type: str
    num_bytes: int
    num_entries: int
    fallback: tuple[str, ...] = ()
    fallback_share: float = 0.0
    num_raw: int = 0
    raw_share: float = 0.0
