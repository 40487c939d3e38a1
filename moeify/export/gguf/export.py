"""`moeify export`: a checkpoint that moeify wrote, or a dense model, as one GGUF file for llama.cpp."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from moeify import engines, results, targets
from moeify.engines import Shape
from moeify.errors import InputError, UsageError, warn
from moeify.export.gguf.architecture import MARK, add_name, add_origin, add_sizes, format_of
from moeify.export.gguf.blocks import Blocks
from moeify.export.gguf.contents import Contents, contents, quantised_contents
from moeify.export.gguf.quantise import TYPES, check_type, default_type
from moeify.export.gguf.result import ExportResult
from moeify.export.gguf.rotation import add_rotation
from moeify.export.gguf.tensors import EMBEDDING, pieces
from moeify.export.gguf.vocabulary import add_vocabulary, copy_vocabulary
from moeify.export.gguf.writer import write
from moeify.export.writer import MoEWriter
from moeify.layout import Layout
from moeify.models.config import load_config
from moeify.models.files import FLOAT_DTYPES, Stored, find_shards, gguf_of, locate, read_headers
from moeify.models.fingerprint import Fingerprint
from moeify.models.heads import check_language_model
from moeify.models.stock import placed
from moeify.options import ExportOptions, Track, untracked
from moeify.plan import PLAN_FILE, SplitPlan, load_plan
from moeify.progress import shown
from moeify.resources import check_room
from moeify.words import listing, percent, printable

# Header and names; what a disk needs beside the tensors.
HEADER_BYTES = 32_000_000


@dataclass(frozen=True)
class _Source:
    """A checkpoint whose files were looked at, or one that is going to be written; no weight is read.

    Args:
        name: as it was named.
        tokenizer: the folder with its tokenizer.
        config: of it.
        stored: its tensors, by name.
        plan: of its split.
    """

    name: str
    tokenizer: Path
    config: Any
    stored: Mapping[str, Stored]
    plan: SplitPlan | None = None


def export_gguf(
    model: str | Path,
    file: str | Path,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
    track: Track[Any] = shown,
    **choices: Any,
) -> ExportResult:
    """Write a checkpoint as one GGUF file.

    Args:
        model: what `moeify split` or `moeify finetune` wrote, or a dense model.
        file: where it goes; appears only when it is complete.
        options: how numbers are stored.
        overwrite: replace an earlier file of moeify's.
        track: wraps long loops to show progress.
        choices: single options by name, in place of those in `options`.

    Raises:
        InputError: llama.cpp does not have the architecture or cannot run this checkpoint, or the file may not be
            replaced or written; nothing is left of it.
        UsageError: the type is not one that is written here.

    Example:
        moeify.export_gguf("my-moe", "my-moe.gguf", type="q8_0")
    """
    file, options = Path(file), ExportOptions.chosen(options, choices)
    path = locate(str(model), track)
    check_file(file, path, overwrite=overwrite)
    config, shards = load_config(path), find_shards(path)
    check_language_model(config, "a GGUF")
    stored, files = read_headers(shards), Fingerprint.take(path, shards)
    # What stock transformers loads is what is written: nothing missing, nothing left over.
    _, report = placed(config, {name: tensor.shape for name, tensor in stored.items()})
    report.check(config.model_type)
    report.warn_of_unexpected()
    plan = load_plan(path) if (path / PLAN_FILE).is_file() else None
    if plan is not None:
        check_engine(config, plan.layout, plan.layers[0].labels_F.numel())
    writer, content = _prepare(_Source(str(model), path, config, stored, plan), options, file, track)
    check_room(file.parent, HEADER_BYTES + content.num_bytes)
    write(file, writer, content.tensors, track)
    files.check_unchanged()
    return ExportResult(
        file=file,
        model=str(model),
        dense=plan.source if plan else "",
        architecture=writer.arch,
        type=content.type,
        num_bytes=file.stat().st_size,
        num_entries=len(content.tensors),
        fallback=content.fallback,
        fallback_share=content.fallback_share,
        num_raw=len(content.raw),
        raw_share=content.raw_share,
    )


def check_split(planned: MoEWriter, file: Path, options: ExportOptions, *, out: Path, overwrite: bool) -> int:
    """Find everything that can be wrong with a GGUF of a checkpoint before that is made.

    Args:
        planned: names and shapes of the checkpoint.
        file, options, overwrite: see `export_gguf`.
        out: the checkpoint's folder.

    Returns:
        Bytes that it is going to take.
    """
    check_file(file, out, overwrite=overwrite)
    config, dense = planned.config(), planned.dense
    check_engine(config, planned.layout, dense.num_neurons)
    dtype = next(words for words, kind in FLOAT_DTYPES.items() if kind == planned.dtype)
    stored = {name: Stored(file, name, dtype, tuple(meta.shape)) for name, meta in planned.shapes().items()}
    _, content = _prepare(_Source(dense.name, dense.path, config, stored), options, file, untracked)
    return HEADER_BYTES + content.num_bytes


def check_file(file: Path, folder: Path, *, overwrite: bool) -> None:
    """Refuse a file that may not be replaced, or cannot be written, before any work.

    Args:
        file: it need not exist.
        folder: of the checkpoint.
        overwrite: an earlier file of moeify's may be replaced.

    Raises:
        InputError: it exists and may not be overwritten, is not moeify's, or its folder cannot be written.
        UsageError: it is inside of the checkpoint.
    """
    if file.absolute().resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{file} is inside of the checkpoint {folder}", f"--gguf {folder.name}.gguf puts it beside")
    results.check_new(file, overwrite=overwrite)
    results.check_writable(file, MARK)


def check_engine(config: Any, layout: Layout, num_neurons: int) -> None:
    """Raise InputError for a layout that llama.cpp does not run; `split` warns of one that is slow there.

    Args:
        config: of the checkpoint.
        layout: of its split.
        num_neurons: of an FFN of the dense model.
    """
    if config.model_type not in targets.names():
        return
    shape = Shape(
        config.model_type,
        layout,
        int(config.num_hidden_layers),
        num_neurons,
        int(config.hidden_size),
        qkv_bias=bool(getattr(config, "attention_bias", False)),
        qk_norm=bool(getattr(config, "use_qk_norm", False)),
        tied=bool(config.tie_word_embeddings),
    )
    engine = engines.find("llama_cpp")
    if reason := engine.refuse(shape):
        raise InputError(f"{engine.name} cannot run this checkpoint: {reason}", "split the model in another layout")


def _prepare(source: _Source, options: ExportOptions, file: Path, track: Track[Any]) -> tuple[Any, Contents]:
    """The header's values in a gguf.GGUFWriter, and what the file is going to hold."""
    form = format_of(source.config)
    found = pieces(form, source.config, source.stored)
    check_type(options.type, source.name, file, {item.name: item.shape for item in found})
    kind = default_type(_dtype_of(source.stored)) if options.type == "auto" else options.type
    original = _original(source) if options.type == "auto" else None
    writer = gguf.GGUFWriter(None, form.architecture)
    add_sizes(writer, form, source.config)
    extra = add_rotation(writer, source.config, form.architecture) if form.rotates else {}
    if original is not None and source.plan is not None:
        blocks = Blocks.open(original, source.plan, form, source.config)
        content, file_type = quantised_contents(found, extra, blocks, track), blocks.file_type
    else:
        content, file_type = contents(found, extra, kind), int(TYPES[kind][1])
    add_origin(writer, file_type)
    if original is not None and (source.plan is None or EMBEDDING in content.raw):
        copy_vocabulary(writer, original)
    else:
        pre = "" if options.tokenizer_pre == "auto" else options.tokenizer_pre
        add_vocabulary(writer, source.tokenizer, source.config, pre=pre)
    add_name(writer, printable(Path(source.name).name))
    if content.fallback:
        warn(
            f"rows of {listing(content.fallback)} are not whole blocks of {content.type}: these tensors, "
            f"{percent(content.fallback_share)} of all weights, are stored as f16"
        )
    return writer, content


def _original(source: _Source) -> Path | None:
    """The GGUF that a model was split from, or is going to be."""
    return gguf_of(Path(source.plan.source if source.plan else source.name).expanduser())


def _dtype_of(stored: Mapping[str, Stored]) -> str:
    """Of the first matrix of a block: small tensors may have another type."""
    return next(tensor.dtype for name, tensor in stored.items() if ".0." in name and len(tensor.shape) > 1)
