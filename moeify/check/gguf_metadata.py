"""Metadata of a GGUF against the dense model: sizes, counts of experts and their widths, rotation, tokenizer."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moeify.check.gguf_file import GGUFFile
from moeify.errors import InputError
from moeify.export.gguf.rotation import add_rotation
from moeify.export.gguf.tokens import vocabulary_of
from moeify.models.dense import DenseModel
from moeify.words import on_one_line

# Numbers of a GGUF are float32.
NEAR = 1e-6
TOKENS = gguf.Keys.Tokenizer.LIST
PRE = gguf.Keys.Tokenizer.PRE


def metadata_difference(opened: GGUFFile, source: DenseModel) -> str:
    """The first value that is not the dense model's or does not fit the tensors, or ""."""
    for key, expected in (*_sizes(source), *_experts(opened), *_factors(opened, source), *_rotation(opened, source)):
        value = opened.own(key)
        if not _is_same(value, expected):
            return f"{key} is {on_one_line(value)} instead of {on_one_line(expected)}"
    return _factor_difference(opened, source)


def _sizes(source: DenseModel) -> Iterator[tuple[str, Any]]:
    config, attention = source.config, source.attention
    yield "block_count", source.num_layers
    yield "embedding_length", source.hidden_size
    yield "attention.head_count", config.num_attention_heads
    yield "attention.head_count_kv", config.num_key_value_heads
    yield "attention.key_length", attention.head_dim
    yield "attention.value_length", attention.head_dim
    yield "attention.layer_norm_rms_epsilon", config.rms_norm_eps
    yield "vocab_size", config.vocab_size
    window = config.max_position_embeddings if attention.sliding_window is None else attention.sliding_window
    yield "context_length", min(window, config.max_position_embeddings)


def _experts(opened: GGUFFile) -> Iterator[tuple[str, Any]]:
    """Counts and widths as the tensors have them."""
    layer = next((n for n in range(opened.num_layers) if opened.get(n, "ffn_gate_exps")), 0)
    gate, shared = opened.get(layer, "ffn_gate_exps"), opened.get(layer, "ffn_gate_shexp")
    if gate is None:
        yield "expert_count", "that of experts in a layer"
        return
    experts, width = gate.shape[0], gate.shape[1]
    yield "expert_count", experts
    used = opened.own("expert_used_count")
    yield "expert_used_count", used if isinstance(used, int) and 1 <= used <= experts else f"1 to {experts}"
    yield opened.width_key, width
    if opened.architecture == "glm4moe":
        yield "leading_dense_block_count", layer
        yield "expert_shared_count", (shared.shape[0] // width if shared else 0)
    elif shared:
        yield "expert_shared_feed_forward_length", shared.shape[0]
    for number in range(layer, opened.num_layers):
        for name, pair in (("ffn_gate_exps", gate), ("ffn_up_exps", gate), ("ffn_gate_shexp", shared)):
            stored = opened.get(number, name)
            if (stored and stored.shape) != (pair and pair.shape):
                yield f"shape of {name} in layer {number}", pair and pair.shape


def _factors(opened: GGUFFile, source: DenseModel) -> Iterator[tuple[str, Any]]:
    """Factors of granite; a llama has neutral ones."""
    if opened.architecture != "granitemoe":
        return
    config, size = source.config, source.attention.head_dim
    yield "attention.scale", getattr(config, "attention_multiplier", size**-0.5)
    yield "embedding_scale", getattr(config, "embedding_multiplier", 1.0)
    yield "residual_scale", getattr(config, "residual_multiplier", 1.0)
    yield "logit_scale", getattr(config, "logits_scaling", 1.0)


def _rotation_of(opened: GGUFFile, source: DenseModel) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    writer = gguf.GGUFWriter(None, opened.architecture)
    tensors = add_rotation(writer, source.config, opened.architecture)
    prefix = f"{opened.architecture}."
    return {k.removeprefix(prefix): v.value for k, v in writer.kv_data[0].items() if k.startswith(prefix)}, tensors


def _rotation(opened: GGUFFile, source: DenseModel) -> Iterator[tuple[str, Any]]:
    expected, _ = _rotation_of(opened, source)
    names = {key for key in opened.header.own if key.startswith("rope.")} | expected.keys()
    yield from ((name, expected.get(name)) for name in sorted(names))


def _factor_difference(opened: GGUFFile, source: DenseModel) -> str:
    """The tensors of a rotation."""
    _, expected = _rotation_of(opened, source)
    names = {name for name in opened.tensors if name.startswith("rope_")} | expected.keys()
    for name in sorted(names):
        if name not in expected or name not in opened.tensors:
            return f"{name} is {'missing' if name in expected else 'there'}"
        if not opened.tensors[name].holds(expected[name]):
            return f"{name} is not that of the dense model's rotary embeddings"
    return ""


def _is_same(value: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(value, int | float):
        return bool(np.isclose(value, expected, rtol=NEAR, atol=0))
    return bool(value == expected)


def text_difference(opened: GGUFFile, source: DenseModel) -> str:
    """The first thing in which the file's tokenizer is not the dense model's, or ""."""
    fields = {key: field for key, field in opened.fields.items() if key.startswith("tokenizer.")}
    if TOKENS not in fields:
        return "there is no tokenizer"
    described = json.loads(source.tokenizer().backend_tokenizer.to_str())
    pre = fields[PRE].contents() if PRE in fields else ""
    if difference := _pre_difference(pre, described, source):
        return difference
    expected = vocabulary_of(described, source.text_config.vocab_size, pre)
    pairs = {TOKENS: expected.tokens, gguf.Keys.Tokenizer.MERGES: expected.merges}
    for key, texts in pairs.items():
        stored = [_text(fields[key], place) for place in range(len(fields[key].data))] if key in fields else []
        if len(stored) != len(texts):
            return f"{len(stored):,} {key.rpartition('.')[2]}, expected {len(texts):,}"
        other = next((n for n, (one, text) in enumerate(zip(stored, texts, strict=True)) if one != text), None)
        if other is not None:
            return f"{key} {other:,} is {on_one_line(repr(stored[other]))} instead of {on_one_line(repr(texts[other]))}"
    return ""


def _pre_difference(pre: str, described: Mapping[str, Any], source: DenseModel) -> str:
    """Another name of how a text is cut before merges than the dense model's, or ""."""
    file = Path(source.name)
    if file.suffix.lower() == ".gguf" and file.is_file():
        # transformers does not carry it from a GGUF to its tokenizer.
        field = gguf.GGUFReader(file).fields.get(PRE)
        right = field.contents() if field else ""
    else:
        try:
            right = vocabulary_of(described, source.text_config.vocab_size, "").pre
        except InputError:
            # The user stated it.
            return ""
    return "" if pre == right else f"{PRE} is {on_one_line(pre)} instead of {on_one_line(right)}"


def _text(field: Any, place: int) -> str:
    return bytes(field.parts[field.data[place]]).decode(errors="replace")
