"""`moeify export`: a checkpoint that moeify wrote, or a dense model, as one GGUF file for llama.cpp."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from moeify import engines, results, targets
from moeify.engines import Shape
from moeify.errors import InputError, warn
from moeify.export.gguf.architecture import MARK, add_origin, add_sizes, format_of
from moeify.export.gguf.quantise import TYPES, check_type, default_type, encode, kind_of, num_bytes
from moeify.export.gguf.rotation import add_rotation
from moeify.export.gguf.tensors import Pieces, pieces
from moeify.export.gguf.vocabulary import add_vocabulary
from moeify.export.gguf.writer import Planned, write
from moeify.models.config import load_config
from moeify.models.files import Stored, find_shards, locate, read_headers
from moeify.models.fingerprint import Fingerprint
from moeify.models.stock import placed
from moeify.options import ExportOptions, Track, untracked
from moeify.plan import PLAN_FILE, SplitPlan, load_plan
from moeify.resources import check_room
from moeify.words import listing, percent

# Header and names; what a disk needs beside the tensors.
HEADER_BYTES = 32_000_000


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        file: the GGUF.
        model: the checkpoint, as it was named.
        dense: the model that it was split from; "" if it is none of moeify's.
        architecture: in llama.cpp's words.
        type: of its matrices.
        num_bytes: of the file.
        num_tensors: in it.
        fallback: tensors of another type than asked for, because their rows are no whole blocks; of all layers once.
        fallback_share: of all weights.
    """

    file: Path
    model: str
    dense: str
    architecture: str
    type: str
    num_bytes: int
    num_tensors: int
    fallback: tuple[str, ...]
    fallback_share: float


@dataclass(frozen=True)
class _Checkpoint:
    """A folder whose files were looked at; no weight is read."""

    name: str
    path: Path
    config: Any
    stored: Mapping[str, Stored]
    files: Fingerprint
    plan: SplitPlan | None

    @classmethod
    def open(cls, model: str, track: Track[Any]) -> "_Checkpoint":
        path = locate(model, track)
        config, shards = load_config(path), find_shards(path)
        stored = read_headers(shards)
        # What stock transformers loads is what is written: nothing missing, nothing left over.
        _, report = placed(config, {name: tensor.shape for name, tensor in stored.items()})
        report.check(config.model_type)
        report.warn_of_unexpected()
        plan = load_plan(path) if (path / PLAN_FILE).is_file() else None
        return cls(model, path, config, stored, Fingerprint.take(path, shards), plan)

    def check_engine(self) -> None:
        """Raise InputError for a layout that llama.cpp does not run; warn of one that is slow there."""
        if self.plan is None or self.config.model_type not in targets.names():
            return
        num_neurons = self.plan.layers[0].labels_F.numel()
        layers, hidden = int(self.config.num_hidden_layers), int(self.config.hidden_size)
        shape = Shape(self.config.model_type, self.plan.layout, layers, num_neurons, hidden)
        engine = engines.find("llama_cpp")
        if reason := engine.refuse(shape):
            raise InputError(f"{engine.name} cannot run {self.name}: {reason}", "split the model in another layout")
        if caution := engine.caution(shape):
            warn(f"{engine.name}: {caution}")


def export_gguf(
    model: str | Path,
    file: str | Path,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
    track: Track[Any] = untracked,
) -> ExportResult:
    """Write a checkpoint as one GGUF file.

    Args:
        model: what `moeify split` or `moeify finetune` wrote, or a dense model.
        file: where it goes; appears only when it is complete.
        options: how numbers are stored.
        overwrite: replace an earlier file of moeify's.
        track: wraps long loops to show progress.

    Raises:
        InputError: llama.cpp does not have the architecture or cannot run this checkpoint, or the file may not be
            replaced or written; nothing is left of it.
    """
    file, options = Path(file), options or ExportOptions()
    check_type(options.type, str(model), str(file))
    check_file(file, overwrite=overwrite)
    checkpoint = _Checkpoint.open(str(model), track)
    form = format_of(checkpoint.config)
    checkpoint.check_engine()
    found = pieces(form, checkpoint.config, checkpoint.stored)
    kind = default_type(_dtype_of(checkpoint.stored)) if options.type == "auto" else options.type
    matrices, file_type = TYPES[kind]
    writer = gguf.GGUFWriter(None, form.architecture)
    add_origin(writer, Path(checkpoint.name).name, file_type)
    add_sizes(writer, form, checkpoint.config)
    extra = add_rotation(writer, checkpoint.config, form.architecture)
    add_vocabulary(writer, checkpoint.path, checkpoint.config)
    tensors = [_given(name, values) for name, values in extra.items()] + [_planned(item, matrices) for item in found]
    fallback = [tensor for tensor in tensors if tensor.kind not in (matrices, gguf.GGMLQuantizationType.F32)]
    share = _numbers(fallback) / _numbers(tensors)
    names = tuple(dict.fromkeys(tensor.name.split(".", 2)[-1] for tensor in fallback))
    if fallback:
        warn(
            f"rows of {listing(names)} are no whole blocks of {kind}, so that these tensors, {percent(share)} of all "
            "weights, are stored as f16"
        )
    check_room(file.parent, HEADER_BYTES + sum(tensor.num_bytes for tensor in tensors))
    write(file, writer, tensors, track)
    checkpoint.files.check_unchanged()
    dense = checkpoint.plan.source if checkpoint.plan else ""
    size = file.stat().st_size
    return ExportResult(file, str(model), dense, form.architecture, kind, size, len(tensors), names, share)


def check_file(file: Path, *, overwrite: bool) -> None:
    """Refuse a file that may not be replaced, or cannot be written, before any work.

    Raises:
        InputError: it exists and may not be overwritten, is not moeify's, or its folder cannot be written.
    """
    results.check_new(file, overwrite=overwrite)
    results.check_writable(file, MARK)


def _planned(item: Pieces, matrices: gguf.GGMLQuantizationType) -> Planned:
    kind = kind_of(item.name, item.shape, matrices)

    def read() -> Iterator[np.ndarray]:
        for rows in item.read():
            yield encode(item.name, rows, kind)

    return Planned(item.name, item.shape, kind, num_bytes(item.shape, kind), read)


def _given(name: str, values: Tensor) -> Planned:
    """A tensor that no file holds, such as factors of a rotation."""
    kind = gguf.GGMLQuantizationType.F32
    shape = tuple(values.shape)
    return Planned(name, shape, kind, num_bytes(shape, kind), partial(_once, name, values, kind))


def _once(name: str, values: Tensor, kind: gguf.GGMLQuantizationType) -> Iterator[np.ndarray]:
    yield encode(name, values[None], kind)


def _numbers(tensors: list[Planned]) -> int:
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors)


def _dtype_of(stored: Mapping[str, Stored]) -> str:
    """Of the first matrix of a block: small tensors may have another type."""
    return next(tensor.dtype for name, tensor in stored.items() if ".0." in name and len(tensor.shape) > 1)
