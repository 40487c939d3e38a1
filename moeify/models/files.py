"""Where a model is: folder, hub id, GGUF or the embedded one; and what its files say before a weight is read.

What is wrong with them is said here: a missing or broken config, tokenizer, index or shard; pickles are never opened.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.cache import cache_dir, made_once
from moeify.errors import InputError
from moeify.models.tokenizer import TOKENIZER_FILES
from moeify.options import Track, untracked

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HUB_PATTERNS = ["*.safetensors", SINGLE_FILE + ".index.json", "config.json", "generation_config.json", *TOKENIZER_FILES]


def locate(model: str, track: Track[Any] = untracked) -> Path:
    """The local folder of a model: itself, the embedded one, a converted GGUF or a downloaded snapshot."""
    path = Path(model).expanduser()
    if model == "builtin":
        from moeify.models.builtin import builtin_model

        return builtin_model(track=track)
    if _kind(path) == "file" and path.suffix == ".gguf":
        return _from_gguf(path)
    if _kind(path) == "folder":
        ggufs = sorted(path.glob("*.gguf"))
        return _from_gguf(ggufs[0]) if ggufs and not (path / "config.json").is_file() else path
    if _kind(path) or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"no model at {model}", "give a folder, a .gguf file, a hub id (org/name) or `builtin`")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{model} is neither a local folder nor a hub model that can be reached: {_first_line(error)}",
            "check the name and the network; a private model needs `hf auth login`",
        ) from error


def _kind(path: Path) -> str:
    """`file`, `folder`, or nothing for a path that is not there or cannot be one."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except OSError:
        # Longer than a name may be.
        return ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def find_shards(path: Path) -> dict[str, Path]:
    """Shard of every tensor, each file's header checked against its length."""
    index = path / INDEX_FILE
    if index.is_file():
        try:
            files = sorted({path / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a safetensors index: {error}", "fetch it again") from error
    else:
        files = [path / SINGLE_FILE]
        if not files[0].is_file():
            pickles = sorted(p.name for p in path.glob("*.bin")) + sorted(p.name for p in path.glob("*.pt*"))
            raise InputError(
                f"no {SINGLE_FILE} in {path}" + (f", only {pickles[0]}, which is a pickle" if pickles else ""),
                "moeify reads safetensors only, because a pickle can run code: "
                "load and save the model once with transformers",
            )
    shards: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"shard {file.name} is missing, {INDEX_FILE} lists it", "fetch the checkpoint again")
        try:
            with safe_open(file, framework="pt") as reader:
                shards.update(dict.fromkeys(reader.keys(), file))
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"shard {file.name} ({file.stat().st_size:,} bytes) is truncated or not safetensors: {error}",
                "fetch it again",
            ) from error
    return shards


def fingerprint(path: Path, shards: Mapping[str, Path]) -> str:
    """sha256 over config and each shard's name, size, modification time and header; enough to notice a change."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for shard in sorted(set(shards.values())):
        stat = shard.stat()
        digest.update(f"{shard.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def _from_gguf(file: Path) -> Path:
    """Convert a GGUF once, through transformers, to a folder in the cache; float32, which GGUF dequantises to."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_dir() / f"gguf-{key}"
    if folder.is_dir():
        return folder
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise InputError("reading GGUF needs the gguf package", "pip install 'moeify[gguf]'") from error
    except Exception as error:
        # A damaged file: the reader raises whatever its parser stumbles over.
        raise InputError(
            f"transformers cannot read {file}: {_first_line(error)}", "fetch it again, or start from safetensors"
        ) from error
    # transformers marks the dequantised model as quantised, which forbids saving it.
    values = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(model.config)(**values), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    with made_once(folder) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder
