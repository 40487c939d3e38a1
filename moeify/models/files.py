"""Where a model is: folder, hub id, GGUF or the embedded one; and what its files say before a weight is read.

What is wrong with them is said here: a missing or broken config, tokenizer, index or shard; pickles are never opened.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from moeify.errors import InputError, first_line, nearest
from moeify.models.companions import COMPANION_PATTERNS
from moeify.options import EMBEDDED, Track, untracked
from moeify.words import printable

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MAX_NAME_BYTES = 255
# The card names the licence, and is not carried on.
HUB_PATTERNS = ["*.safetensors", INDEX_FILE, "config.json", "generation_config.json", "README.md", *COMPANION_PATTERNS]


def locate(model: str, track: Track[Any] = untracked) -> Path:
    """The local folder of a model: itself, that of a file in it, the embedded one, a GGUF's or a downloaded one's."""
    path = Path(model).expanduser()
    if model == "builtin":
        from moeify.models.builtin import builtin_model

        return builtin_model(track=track)
    if model == "builtin-vit":
        from moeify.models.builtin_vit import builtin_vit

        return builtin_vit(track=track)
    if (gguf := gguf_of(path)) is not None:
        from moeify.models.gguf import from_gguf

        return from_gguf(gguf)
    if _kind(path) == "folder":
        return path
    if _kind(path) == "file":
        return _folder_of(path)
    is_file = path.suffix in (".safetensors", ".gguf", ".json")
    if _kind(path) or is_file or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"no model at {model}", _hint(path))
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{model} is neither a local folder nor a hub model that can be reached: {first_line(error)}",
            "check the name and the network; a private model needs `hf auth login`",
        ) from error


def _hint(path: Path) -> str:
    """What stands beside a path that is not there, or the embedded model, if it has nearly that name."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        beside = []
    similar = nearest(path.name, [*beside, *EMBEDDED])
    question = f"did you mean {path.with_name(similar)}? " if similar else ""
    return f"{question}give a folder, a .gguf file, a hub id (org/name) or `builtin`"


def _folder_of(file: Path) -> Path:
    """The folder of the model that a file is part of, as other programs are given it.

    Raises:
        InputError: it is part of none, or of another model than the one that stands in its folder.
    """
    folder, hint = file.parent, "give the model's folder, a .gguf file, a hub id (org/name) or `builtin`"
    if file.name in (INDEX_FILE, "config.json"):
        return folder
    if file.suffix == ".safetensors":
        if file in find_shards(folder).values():
            return folder
        raise InputError(f"{file} is not one of the files of the model in {folder}", hint)
    raise InputError(f"{file} is not a model", hint)


def gguf_of(path: Path) -> Path | None:
    """The GGUF that a model's path stands for: itself, or the only one in its folder; None if it is something else."""
    gguf = _only_gguf(path) if _kind(path) == "folder" else path
    return gguf if gguf is not None and gguf.suffix == ".gguf" and _kind(gguf) == "file" else None


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF of a folder that holds nothing else to convert."""
    names = sorted(file.name for file in folder.glob("*.gguf"))
    if not names or (folder / "config.json").is_file():
        return None
    if len(names) > 1:
        raise InputError(
            f"{folder} holds {len(names)} GGUF files: {printable(', '.join(names))}",
            "name the file; parts of one model are joined by llama-gguf-split --merge",
        )
    return inside(folder, names[0])


def _kind(path: Path) -> str:
    """`file`, `folder`, or nothing for a path that is not there or cannot be one."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except OSError:
        # Longer than a name may be.
        return ""


def inside(folder: Path, name: str) -> Path:
    """The path of a file that belongs to a model; links that leave the model's folder are not followed.

    Links into the blobs of the hub's cache are: there snapshots/REVISION/NAME is a link to blobs/HASH.

    Args:
        folder: of the model.
        name: relative, with / before what lies in a folder below; a file of that name need not be there.

    Raises:
        InputError: the name leads out of the folder, by its parts or by a link.
    """
    if not _is_plain(name):
        raise InputError(
            f"{printable(name)!r} is not the name of a file inside {folder}", "names are relative and go down, never up"
        )
    path, root = folder / name, folder.resolve()
    roots = [root, *(parent.parent / "blobs" for parent in (root, *root.parents)[1:] if parent.name == "snapshots")]
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is a link that leads nowhere: {error}", "put the file itself there") from error
    if not any(target.is_relative_to(parent) for parent in roots):
        raise InputError(
            f"{path} is a link to {target}, which is outside of the model's folder",
            "put the file itself there: links are followed inside the folder and into the hub's cache only",
        )
    return path


def _is_plain(name: object) -> bool:
    """Whether a name, which may come from a file of any content, is a relative path without ways up."""
    if not isinstance(name, str):
        return False
    try:
        parts = os.fsencode(name).split(b"/")
    except ValueError:
        return False
    return all(
        part not in (b"", b".", b"..") and len(part) <= MAX_NAME_BYTES and not {0, ord("\\")} & set(part)
        for part in parts
    )


def find_shards(path: Path) -> dict[str, Path]:
    """Shard of every tensor that transformers would load from a folder, each file's header checked against its length.

    Raises:
        InputError: there are none, some are missing or broken, or transformers would load more than they.
    """
    _refuse_other_weights(path)
    single = inside(path, SINGLE_FILE)
    # Of both, transformers takes the single file.
    files = [single] if single.is_file() else _indexed(path)
    shards: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise InputError(
                f"shard {printable(file.name)} is missing, {INDEX_FILE} lists it", "fetch the checkpoint again"
            )
        try:
            with safe_open(file, framework="pt") as reader:
                names = list(reader.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"shard {printable(file.name)} ({file.stat().st_size:,} bytes) is truncated or not safetensors: "
                f"{printable(error)}",
                "fetch it again",
            ) from error
        twice = next((name for name in names if name in shards), None)
        if twice is not None:
            raise InputError(
                f"{printable(twice)} is in {shards[twice].name} and in {file.name}",
                "each tensor belongs in one shard: fetch the checkpoint again",
            )
        shards.update(dict.fromkeys(names, file))
    return shards


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, of which the header was read.

    Args:
        file: it is in.
        name: in the file.
        dtype: in the words of safetensors.
        shape: of it.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(shards: Mapping[str, Path]) -> dict[str, Stored]:
    """What is in shards, by name; reads no weight.

    Args:
        shards: file of each tensor.
    """
    tensors = {}
    for file in sorted(set(shards.values())):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                tensor = reader.get_slice(name)
                tensors[name] = Stored(file, name, tensor.get_dtype(), tuple(tensor.get_shape()))
    return tensors


def _refuse_other_weights(path: Path) -> None:
    """Refuse a folder from which transformers would load more, or other, than its safetensors."""
    adapters = sorted(file.name for file in path.glob("adapter_*") if file.name in ADAPTER_FILES)
    if adapters:
        raise InputError(
            f"{path} holds an adapter ({', '.join(adapters)}), which transformers applies when it loads the folder",
            "merge it (peft: merge_and_unload, then save_pretrained), or move the adapter's files to another folder",
        )
    distributed = next(path.glob("shard-[0-9]*-model-[0-9]*-of-[0-9]*.safetensors"), None)
    if distributed is not None:
        raise InputError(
            f"{path} holds parts of a distributed training ({distributed.name})",
            "load the model once with transformers and save it with save_pretrained",
        )


def _indexed(path: Path) -> list[Path]:
    """The files of an index."""
    index = inside(path, INDEX_FILE)
    if not index.is_file():
        pickles = sorted(file.name for kind in ("*.bin", "*.bin.index.json", "*.pt*") for file in path.glob(kind))
        raise InputError(
            f"no {SINGLE_FILE} in {path}" + (f", only {pickles[0]}, which is a pickle" if pickles else ""),
            "moeify reads safetensors only, because a pickle can run code: "
            "load and save the model once with transformers",
        )
    try:
        content = json.loads(index.read_text())
        names = list(content["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise InputError(f"{index} is not a safetensors index: {printable(error)}", "fetch it again") from error
    outside = [name for name in names if not _is_plain(name) or "/" in name]
    if outside or not names:
        raise InputError(
            f"{index} is an index of the shards {printable(outside[:1])}, expected names of files beside it",
            "fetch it again",
        )
    if not isinstance(content.get("metadata"), dict):
        raise InputError(
            f"the index {index} has no metadata, without which transformers does not load it",
            'fetch it again, or add "metadata": {}',
        )
    return [inside(path, name) for name in sorted(set(names))]
