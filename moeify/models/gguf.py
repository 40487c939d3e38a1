"""From a GGUF file to a folder in the cache, through transformers, which dequantises it to float32.

Its header is read here first, with bounds: parts, missing tensors and everything in it that transformers leaves out
without a word are refused, because the folder would be another model. What cannot be compared is said.
"""

import hashlib
import math
import struct
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from moeify.cache import cache_dir, made_once
from moeify.errors import InputError, first_line, warn
from moeify.models.fingerprint import SAMPLE_BYTES
from moeify.models.pretokenizers import apply, named
from moeify.models.stock import load_gguf, quiet
from moeify.models.tokenizer import stock_tokenizer
from moeify.words import listing, printable

# Of the folder that is made: what an earlier moeify kept is made anew.
FORMAT = 2
# Of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: number of a value's type -> its format for struct.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# More than any model has: what announces more is damaged, and is not read for hours.
MAX_DIMENSIONS, MAX_ITEMS = 8, 4_000_000
# What the config must say, by what the header says; a config has one of the names, or none.
COMPARED: Mapping[str, tuple[str, ...]] = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "attention.value_length": ("head_dim",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "rope.freq_base": ("rope_theta",),
}
# Part of the shapes of tensors, or no part of the computation.
HARMLESS = {"attention.causal", "feed_forward_length", "rope.dimension_count", "tensor_data_layout", "vocab_size"}
# Values that multiply or bend what flows through the model, and the value of each that changes nothing; so does 0.
EFFECTS: Mapping[str, float] = {
    "attention.clamp_kqv": 0,
    "attention.scale": 0,
    "attn_logit_softcapping": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.factor": 1,
}
FROM_SAFETENSORS = "start from the model's safetensors"


@dataclass(frozen=True)
class Header:
    """What a GGUF says of itself.

    Args:
        metadata: values by key; of an array its length.
        shapes: of the tensors, by name.
        samples: first bytes of each tensor.
        content: the header's own bytes.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    samples: tuple[bytes, ...]
    content: bytes

    @cached_property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @cached_property
    def own(self) -> dict[str, Any]:
        """The values of the architecture."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}


def from_gguf(file: Path) -> Path:
    """The folder of a GGUF, which is converted once.

    Args:
        file: complete, not one of several parts.

    Raises:
        InputError: it is damaged, or transformers would make another model of it.
    """
    header = read_header(file)
    parts = header.metadata.get("split.count", 1)
    if parts != 1:
        raise InputError(
            f"{file} is one of {parts} parts", f"join them: llama-gguf-split --merge {file.name} merged.gguf"
        )
    stat = file.stat()
    made_by = f"{transformers.__version__} {FORMAT}"
    key = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {made_by}".encode() + header.content)
    key.update(b"".join(header.samples))
    folder = cache_dir() / f"gguf-{key.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as alone:
        # transformers looks into every file beside a GGUF, and for its name in the working folder first.
        link = Path(alone) / f"{uuid.uuid4().hex}.gguf"
        link.symlink_to(file.resolve())
        try:
            with quiet():
                config = AutoConfig.from_pretrained(alone, gguf_file=link.name, trust_remote_code=False)
                tokenizer = stock_tokenizer(Path(alone), gguf_file=link.name)
            check_complete(file, header, config)
            model, report = load_gguf(link)
        except ImportError as error:
            raise InputError("reading GGUF needs the gguf package", "pip install 'moeify[gguf]'") from error
        except InputError as error:
            raise InputError(str(error).replace(alone, str(file.parent)), error.hint) from error
        except Exception as error:
            # A damaged file: the reader raises whatever its parser stumbles over.
            raise InputError(
                f"transformers cannot read {file}: {first_line(error)}", f"fetch it again, or {FROM_SAFETENSORS}"
            ) from error
    if (stat.st_size, stat.st_mtime_ns) != (file.stat().st_size, file.stat().st_mtime_ns):
        raise InputError(f"{file} changed while it was read", "run the same command again when nothing writes there")
    report.check(f"{file.name} ({header.architecture})")
    _repair_cut(file, header, tokenizer)
    # transformers marks the dequantised model as quantised, which forbids saving it.
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    plain = AutoModelForCausalLM.from_config(type(model.config)(**values), dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    with made_once(folder) as partial, quiet():
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def check_complete(file: Path, header: Header, config: Any) -> None:
    """Compare what a GGUF says with the config that transformers made of it.

    Raises:
        InputError: they differ, or the config leaves out a value that changes what the model computes.
    """
    _check_rotation(file, header, config)
    _check_sizes(file, header, config)
    read = getattr(transformers.integrations.ggml, "GGUF_CONFIG_MAPPING", {}).get(header.architecture, {})
    unknown = []
    for key, value in sorted(header.own.items()):
        made = _value(config, COMPARED.get(key, ()))
        if key in COMPARED and made is not None:
            if not _is_same(value, made):
                raise InputError(
                    f"{file} says {printable(key)} = {value}, the config that transformers makes of it {made}",
                    f"it would be another model: {FROM_SAFETENSORS}",
                )
        elif key in EFFECTS:
            if not read.get(key) and value not in (0, EFFECTS[key]):
                raise InputError(
                    f"{file} says {printable(key)} = {value}, which transformers does not read from a GGUF",
                    f"it would be another model: {FROM_SAFETENSORS}",
                )
        elif key not in HARMLESS and not read.get(key) and not key.startswith("rope.scaling."):
            unknown.append(printable(key))
    if unknown:
        warn(f"{file.name}: transformers does not read {listing(unknown)}, and whether that matters is not known here")


def _check_sizes(file: Path, header: Header, config: Any) -> None:
    """Compare the numbers of weights, before memory is taken for a model that a damaged header describes."""
    blocks = {name.split(".")[1] for name in header.shapes if name.startswith("blk.")}
    if header.own.get("block_count") != len(blocks):
        raise InputError(
            f"{file} says {header.own.get('block_count')} blocks, and holds tensors of {len(blocks)}",
            f"fetch it again, or {FROM_SAFETENSORS}",
        )
    stored = sum(math.prod(shape) for shape in header.shapes.values())
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if stored > described:
        raise InputError(
            f"{file} holds {stored:,} weights, the model that transformers makes of it has {described:,}",
            f"the rest would be lost: {FROM_SAFETENSORS}",
        )
    # What is missing is named when it is loaded.
    if described > 2 * stored:
        raise InputError(
            f"{file} describes a model of {described:,} weights and holds {stored:,}",
            f"fetch it again, or {FROM_SAFETENSORS}",
        )


def _check_rotation(file: Path, header: Header, config: Any) -> None:
    """Refuse scaled rotary embeddings that the config does not have."""
    kind = header.own.get("rope.scaling.type", "none")
    tensors = [name for name in header.shapes if name.startswith(("rope_freqs.", "rope_factors_"))]
    scaled = kind != "none" or tensors
    parameters = getattr(config, "rope_parameters", None) or {}
    if scaled and parameters.get("rope_type", "default") == "default":
        reason = f"rope.scaling.type {printable(kind)}" if kind != "none" else f"tensor {printable(tensors[0])}"
        raise InputError(
            f"{file} has scaled rotary embeddings ({reason}), which transformers does not read from a GGUF",
            f"it would be another model: {FROM_SAFETENSORS}",
        )


def _repair_cut(file: Path, header: Header, tokenizer: Any) -> None:
    """Let the tokenizer cut text before merges as the GGUF says, whose name for it transformers ignores.

    Without it SmolLM2's GGUF (`smollm`) and its tokenizer.json differ in 18 of 13,575 tokens of builtin-heldout.
    """
    name = header.metadata.get("tokenizer.ggml.pre")
    if name is None or header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    if one := named(str(name)):
        apply(one, tokenizer.backend_tokenizer)
        return
    warn(
        f"{file.name} cuts text as {printable(name)}, which transformers does not read from a GGUF: some texts, "
        f"such as long numbers, may become other tokens than in llama.cpp; {FROM_SAFETENSORS} to have the same"
    )


def _value(config: Any, names: tuple[str, ...]) -> Any:
    """The first of some values that a config has."""
    rotation = getattr(config, "rope_parameters", None) or {}
    values = (rotation.get(name, getattr(config, name, None)) for name in names)
    value = next((value for value in values if value is not None), None)
    return config.hidden_size // config.num_attention_heads if value is None and names == ("head_dim",) else value


def _is_same(value: Any, made: Any) -> bool:
    """Whether two values agree; a GGUF has float32."""
    if isinstance(value, str) or isinstance(made, str):
        return bool(value == made)
    return math.isclose(value, made, rel_tol=1e-6)


def read_header(file: Path) -> Header:
    """Read what stands before the weights, and the beginning of each; nothing is believed about lengths.

    Raises:
        InputError: it is no GGUF, or it ends too early.
    """
    try:
        with file.open("rb") as opened:
            return _Reader(opened, file.stat().st_size).header()
    except (ValueError, struct.error, OSError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{file} is truncated or no GGUF: {printable(error)}", f"fetch it again, or {FROM_SAFETENSORS}"
        ) from error


class _Reader:
    """Reads values one after the other, none beyond the end."""

    def __init__(self, opened: BinaryIO, size: int) -> None:
        self._opened, self._size = opened, size

    def header(self) -> Header:
        magic, version, num_tensors, num_values = self.take("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}; expected GGUF, version 2 or 3")
        if max(num_tensors, num_values) > MAX_ITEMS:
            raise ValueError(f"{num_tensors:,} tensors and {num_values:,} values are announced")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self.take("I")[0])
        shapes, offsets = {}, []
        for _ in range(num_tensors):
            name = self._string()
            (rank,) = self.take("I")
            if rank > MAX_DIMENSIONS:
                raise ValueError(f"a tensor with {rank} dimensions")
            shapes[name] = self.take(f"{rank}Q")
            offsets.append(self.take("IQ")[1])
        end = self._opened.tell()
        alignment = int(metadata.get("general.alignment", 32)) or 32
        start = -(-end // alignment) * alignment
        self._opened.seek(0)
        content = self._opened.read(end)
        return Header(metadata, shapes, tuple(self._sample(start + offset) for offset in offsets), content)

    def take(self, layout: str) -> tuple[Any, ...]:
        """The next values, by their format for struct."""
        layout = "<" + layout
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))

    def _bytes(self, count: int) -> bytes:
        left = self._size - self._opened.tell()
        if count > left:
            raise ValueError(f"{count:,} bytes are announced where {max(left, 0):,} are left")
        return self._opened.read(count)

    def _string(self) -> str:
        return self._bytes(self.take("Q")[0]).decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        kind, count = self.take("IQ")
        if count > MAX_ITEMS:
            raise ValueError(f"an array of {count:,} values is announced")
        if kind in SCALARS:
            self._bytes(count * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            for _ in range(count):
                self._string()
        else:
            raise ValueError(f"an array of values of the type {kind}")
        return count

    def _sample(self, offset: int) -> bytes:
        if offset >= self._size:
            raise ValueError(f"a tensor begins at byte {offset:,} of {self._size:,}")
        self._opened.seek(offset)
        return self._opened.read(SAMPLE_BYTES)
