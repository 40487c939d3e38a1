"""The fields of a config, each with a type and a range, and how they fit each other.

transformers checks the types of its configs' fields; what it takes besides, ranges and relations are checked here.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from moeify.errors import InputError, warn
from moeify.modeling.configuration_moeify import BY_LAYER as OF_LAYER
from moeify.modeling.configuration_moeify import of_layer
from moeify.models.json_files import shown

# Ranges of whole numbers, by transformers' common names; the upper ends are far beyond any model.
RANGES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), (1, 2**31 - 1)),
    **dict.fromkeys(("moe_intermediate_size", "n_inner"), (1, 2**31 - 1)),
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size", "sliding_window"), (0, 2**31 - 1)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok"), (1, 2**16)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), (0, 2**16)),
    **dict.fromkeys(("router_width", "min_experts_per_tok"), (0, 2**16)),
    **dict.fromkeys(("n_group", "topk_group", "decoder_sparse_step", "pretraining_tp"), (1, 2**16)),
    **dict.fromkeys(("first_k_dense_replace", "max_window_layers", "num_mtp_layers"), (0, 2**16)),
    **dict.fromkeys(("num_hidden_layers", "num_decoder_layers", "decoder_layers"), (1, 4096)),
    **dict.fromkeys(("d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), (1, 2**31 - 1)),
    **dict.fromkeys(("relative_attention_num_buckets", "decoder_attention_heads"), (1, 2**16)),
    "num_labels": (0, 2**16),
}
MAPPINGS = ("rope_parameters", "rope_scaling", "quantization_config", "auto_map", "id2label", "label2id")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "expert_activation")
BY_LAYER, FFN_BY_LAYER = "num_experts_per_tok_by_layer", "ffn_by_layer"
# What configs of an encoder and a decoder call the layers of the latter.
DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "null",
    list: "a list",
    dict: "a mapping",
}


def refused(file: str | Path, name: str, value: Any, expected: str) -> InputError:
    """The error of a field that is not what it must be."""
    return InputError(f"{file}: {name} is {shown(value)}, expected {expected}", "fetch the file again, or correct it")


def check_declared(file: str | Path, declared: Mapping[str, Any], config_class: Any) -> None:
    """Check what must be right before transformers makes lists of so many layers or labels from it."""
    for name, value in declared.items():
        # They would replace what the config does.
        if name.startswith("__") or name == "attribute_map" or callable(getattr(config_class, name, None)):
            raise InputError(f"{file}: {shown(name)} is not a field of a config", "remove it from the file")
        _check_extra(file, name, value)
    _check_types(file, declared, config_class)
    check_numbers(file, declared, config_class)
    kinds, layers = declared.get("layer_types"), declared.get(_stored_name(config_class, "num_hidden_layers"))
    if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) != layers:
        raise refused(file, "layer_types", kinds, f"one for each of {layers:,} layers, not {len(kinds):,}")


def _check_extra(file: str | Path, name: str, value: Any) -> None:
    """Check fields that transformers takes beside those that its classes declare."""
    if value is None:
        return
    if name in MAPPINGS and not isinstance(value, dict):
        raise refused(file, name, value, "a mapping or null")
    if name == "layer_types" and not (isinstance(value, list) and all(isinstance(kind, str) for kind in value)):
        raise refused(file, name, value, "a list of texts or null")
    if name == "num_labels" and not _whole(value, *RANGES[name]):
        raise refused(file, name, value, _between(*RANGES[name]))
    if name == "output_attentions" and not isinstance(value, bool):
        raise refused(file, name, value, "true, false or null")
    if name in ("dtype", "torch_dtype") and not _is_float_type(value):
        raise refused(file, name, value, 'a floating-point type of torch, such as "bfloat16"')
    if name.strip("_") in IMPLEMENTATIONS and not isinstance(value, str):
        raise refused(file, name, value, "a text or null")


def _check_types(file: str | Path, values: Mapping[str, Any], config_class: Any) -> None:
    """Check every field against its annotation in the class."""
    for name, kind in _annotations(config_class).items():
        value = values.get(name, MISSING)
        # A list may hold infinity in transformers' own writing, a mapping, which its own validation knows.
        if value is MISSING or (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
            continue
        try:
            type_validator(name, value, kind)
        except (TypeError, ValueError) as error:
            words = dict.fromkeys(WORDS.get(_plain(one), str(one)) for one in _members(kind))
            raise refused(file, name, value, " or ".join(words)) from error


@lru_cache
def _annotations(config_class: Any) -> dict[str, Any]:
    """Type of every field; those of the base class are texts, which transformers' own validation takes for anything."""
    base = get_type_hints(PreTrainedConfig, localns={"torch": torch})
    return {f.name: base.get(f.name, f.type) if isinstance(f.type, str) else f.type for f in fields(config_class)}


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _plain(kind: Any) -> Any:
    return get_origin(kind) or kind


def check_numbers(file: str | Path, values: Mapping[str, Any], config_class: Any) -> None:
    """Check the range of every number that the class declares to be one; null is left to the types."""
    for names, is_whole in _numbers(config_class):
        for name in names:
            value = values.get(name)
            if value is None:
                continue
            low_high = next((RANGES[known] for known in names if known in RANGES), None)
            if not is_whole:
                _check_float(file, name, value)
            elif low_high is not None and not _whole(value, *low_high):
                raise refused(file, name, value, _between(*low_high))


def _check_float(file: str | Path, name: str, value: Any) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= torch.finfo().max
    if name.endswith(("_eps", "_epsilon")):
        # Of a norm whose inputs may all be zero.
        if not (fits and 0 < value < 1):
            raise refused(file, name, value, "a number above 0 and below 1")
    elif name.endswith(("dropout", "_pdrop")):
        if not (fits and 0 <= value <= 1):
            raise refused(file, name, value, "a number from 0 to 1")
    elif not fits:
        raise refused(file, name, value, "a finite number that float32 holds")


@lru_cache
def _numbers(config_class: Any) -> list[tuple[tuple[str, ...], bool]]:
    """Fields of one number, by their own name and transformers' common one, and whether they are whole numbers."""
    common = {stored: name for name, stored in config_class.attribute_map.items()}
    numbers = []
    for name, kind in _annotations(config_class).items():
        members = set(_members(kind))
        if members <= {int, float, NoneType} and not name.endswith(("_token_id", "_token_index")):
            numbers.append((tuple(dict.fromkeys((name, common.get(name, name)))), float not in members))
    return numbers


def _stored_name(config_class: Any, name: str) -> str:
    return str(config_class.attribute_map.get(name, name))


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _between(low: int, high: int) -> str:
    return f"a whole number from {low} to {high:,}"


def _is_float_type(name: Any) -> bool:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def check_relations(file: str | Path, config: Any) -> None:
    """Check how fields fit each other."""
    heads, keys = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(keys, int) and heads % keys:
        raise InputError(
            f"{file}: num_attention_heads is {heads}, which is not a multiple of num_key_value_heads, {keys}",
            "every head of keys and values serves equally many others",
        )
    for name in ACTIVATIONS:
        value = getattr(config, name, None)
        if value is not None and not (isinstance(value, str) and value in ACT2FN):
            raise refused(file, name, value, f"one of {', '.join(ACT2FN)}")
    active, experts = getattr(config, "num_experts_per_tok", None), _experts(config)
    if isinstance(active, int) and experts is not None and active > experts:
        raise refused(file, "num_experts_per_tok", active, f"at most the number of experts, {experts:,}")
    by_layer, layers = getattr(config, BY_LAYER, None), _num_layers(config)
    fits = isinstance(by_layer, list) and all(_whole(number, 0, experts or 0) for number in by_layer)
    if by_layer is not None and not (fits and len(by_layer) == layers):
        raise refused(file, BY_LAYER, by_layer, f"null or {layers} whole numbers up to {experts}")
    single = getattr(config, FFN_BY_LAYER, None)
    fits = single is None or (isinstance(single, list) and len(single) == layers and all(map(_is_ffn, single)))
    if not fits or (single and not all(_can_choose(of_layer(config, layer)) for layer in range(len(single)))):
        raise refused(file, FFN_BY_LAYER, single, f"null or {layers} mappings of {', '.join(OF_LAYER)} to numbers")


def _is_ffn(values: Any) -> bool:
    """Whether this can be what a config says of the experts of one layer."""
    named = isinstance(values, dict) and set(values) <= set(OF_LAYER)
    return named and all(_whole(value, 0, RANGES["intermediate_size"][1]) for value in values.values())


def _can_choose(ffn: Any) -> bool:
    """Whether a layer has as many experts as it chooses; one that has none chooses none."""
    least, chosen, experts = ffn.min_experts_per_tok or 0, ffn.num_experts_per_tok, ffn.num_experts
    return bool(not experts or (max(1, least) <= chosen <= experts and ffn.moe_intermediate_size))


def _num_layers(config: Any) -> int | None:
    """Of all lists of blocks; None where config.json does not say."""
    several = isinstance(getattr(config, "ffn_blocks", None), list)
    names = ("num_hidden_layers", *(DECODER_LAYERS if several else ()))
    whole = config if hasattr(config, names[0]) else config.get_text_config()
    numbers = [value for name in names if isinstance(value := getattr(whole, name, None), int)]
    return sum(numbers) if numbers else None


def _experts(config: Any) -> int | None:
    values = (getattr(config, name, None) for name in EXPERTS)
    return next((value for value in values if isinstance(value, int) and value), None)


def check_tokens(file: str | Path, config: Any) -> None:
    """Refuse a padding token without an embedding; others matter to nothing but the end of generated text."""
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        for token in value if isinstance(value, list) else [value]:
            if not isinstance(token, int) or 0 <= token < vocabulary:
                continue
            if name == "pad_token_id" and token != -1:
                raise refused(file, name, token, f"null or a token of the vocabulary, 0 to {vocabulary - 1:,}")
            warn(f"{file}: {name} {token:,} is outside the vocabulary of {vocabulary:,} tokens; it is kept as it is")
