"""The config of a model, checked before anything is made from it: every field has a type and a range.

transformers checks the types of its configs' fields; sizes, ranges and how fields fit each other are checked here, and
how they fit the weights beside them. All of it reads two small files and allocates nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeify import families
from moeify.errors import InputError, first_line, warn
from moeify.modeling.configuration_moeify import MODEL_TYPE, config_class
from moeify.models.heads import auto_class
from moeify.models.json_files import read_mapping, shown
from moeify.models.rotary import rotary_fault
from moeify.options import Style

CONFIG_FILE = "config.json"
LIMIT_BYTES = 1 << 24
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
    "num_hidden_layers": (1, 4096),
    "num_labels": (0, 2**16),
}
MAPPINGS = ("rope_parameters", "rope_scaling", "quantization_config", "auto_map", "id2label", "label2id")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "expert_activation")
BY_LAYER = "num_experts_per_tok_by_layer"
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
# How the name of a tensor begins that belongs to another part than the one that reads text.
TOWER = re.compile(r"^(?:model\.)?(?:vision|visual|audio)")
DECODER = re.compile(r"decoder\.")
# A number takes at least half a byte of a file, whatever it is quantised to, and tied ones are there once.
NUMBERS_PER_BYTE = 2
# Fewer take no memory to speak of: what is wrong with such weights is said by whoever reads them.
FEW_NUMBERS = 1 << 28


def load_config(path: Path) -> Any:
    """The transformers config of a folder, checked; code inside the folder is never run.

    Raises:
        InputError: it cannot be read, a field is not what it must be, or fields do not fit each other or the weights.
    """
    file = path / CONFIG_FILE
    if not file.exists() and not file.is_symlink():
        raise InputError(f"no {CONFIG_FILE} in {path}", "expected a Hugging Face model folder")
    declared = read_mapping(file, limit_bytes=LIMIT_BYTES)
    config_class = _class_of(file, declared)
    for part, values, its_class in _declared_parts(file, declared, config_class):
        _check_declared(part, values, its_class)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # Validators of its classes, and whatever else transformers stumbles over.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None
        raise InputError(f"transformers cannot read {file}: {first_line(cause or error)}", _hint()) from error
    _forget_implementations(file, config)
    if getattr(config, "is_heterogeneous", False):
        # Each layer has values of its own; transformers refuses to give one for all.
        return config
    for part, one in _parts(file, config):
        _check_numbers(part, {field.name: getattr(one, field.name, None) for field in fields(one)}, type(one))
        _check_relations(part, one)
        if fault := rotary_fault(one):
            raise _refused(part, *fault)
        _check_tokens(part, one)
        _check_sizes(part, path, one)
    return config


def empty_model(config: Any, *, buffers: bool) -> Any:
    """The stock model of a config without weights.

    Args:
        config: from `load_config`.
        buffers: its buffers are real, its parameters alone are on the meta device.

    Raises:
        InputError: transformers cannot build it.
    """
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False).eval()
        # What makes initial weights also ties them.
        model.tie_weights()
        return model
    except Exception as error:
        place = f" of {Path(config.name_or_path) / CONFIG_FILE}" if config.name_or_path else ""
        raise InputError(
            f"transformers cannot build the {config.model_type}{place}: {first_line(error)}",
            "expected the config of a model that stock transformers holds",
        ) from error


def check_layers(config: Any, blocks: str, names: Iterable[str]) -> None:
    """Refuse layers that differ in size, and weights with another number of them, before a model is made of a config.

    Args:
        config: from `load_config`.
        blocks: the list of blocks, by its name in the stock model; names of tensors may have other prefixes.
        names: of all tensors.
    """
    if getattr(config, "is_heterogeneous", False):
        raise InputError("config.json has a per_layer_config, expected layers of one size", "start from another model")
    # Some names on disk are of an older transformers, which called the list `layer`.
    number = re.compile(rf"(?:^|\.){re.escape(blocks.rpartition('.')[2].removesuffix('s'))}s?\.(\d+)\.")
    # Of an encoder and a decoder only one is cut.
    layers = config.get_text_config()
    others = [TOWER] if layers is not config else []
    others += [DECODER] if ".encoder." in blocks else []
    ours = (name for name in names if not any(other.search(name) for other in others))
    count = len({found[1] for name in ours if (found := number.search(name))})
    if count != layers.num_hidden_layers:
        raise InputError(
            f"config.json says {layers.num_hidden_layers:,} layers, the weights have {count:,}",
            "config.json and the weights are not of the same model",
        )


def _forget_implementations(file: str | Path, config: Any) -> None:
    """Leave to whoever loads the model how it is computed: a config may name kernels of the hub, or modules to replace.

    Raises:
        InputError: it names another file of weights.
    """
    config._attn_implementation = config._experts_implementation = None
    other = getattr(config, "transformers_weights", None)
    if other is not None:
        raise InputError(
            f"{file} says that the weights are in {shown(other)} (transformers_weights)",
            "name the file model.safetensors and remove that line",
        )
    config.fusion_config = None
    del config.fusion_config


def _hint() -> str:
    # A file of a newer transformers may hold what this one does not know.
    return f"this is transformers {transformers.__version__}; supported: {', '.join(families.names())}"


def _refused(file: str | Path, name: str, value: Any, expected: str) -> InputError:
    return InputError(f"{file}: {name} is {shown(value)}, expected {expected}", "fetch the file again, or correct it")


def _class_of(file: Path, declared: Mapping[str, Any]) -> Any:
    """transformers' class of this config."""
    if "model_type" not in declared:
        raise InputError(f"{file} has no model_type", "expected the config of a transformers model")
    name = declared["model_type"]
    if not isinstance(name, str):
        raise _refused(file, "model_type", name, "the name of an architecture")
    if name not in CONFIG_MAPPING:
        code = "; code of the folder is never run" if declared.get("auto_map") else ""
        raise InputError(
            f"{file}: model_type {shown(name)} is not known to transformers {transformers.__version__}{code}",
            f"supported: {', '.join(families.names())}",
        )
    return CONFIG_MAPPING[name] if name != MODEL_TYPE else _own_class(file, declared)


def _declared_parts(
    file: Path, declared: Mapping[str, Any], config_class: Any
) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """What a config says of the whole model and of each of its parts, with a name and a class."""
    yield str(file), declared, config_class
    for name, its_class in config_class.sub_configs.items():
        values = declared.get(name)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise _refused(file, name, values, "a mapping")
        kind = values.get("model_type")
        # A class that is known reads what it finds, whatever that calls itself.
        if its_class is AutoConfig and kind is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
            raise _refused(file, f"{name}.model_type", kind, "the name of an architecture")
        known = CONFIG_MAPPING[kind] if its_class is AutoConfig and kind is not None else its_class
        if known is not AutoConfig:
            yield f"{file}, {name}", values, known


def _parts(file: Path, config: Any) -> Iterator[tuple[str, Any]]:
    """The config and those of its parts, with a name."""
    yield str(file), config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield f"{file}, {name}", part


def _own_class(file: Path, declared: Mapping[str, Any]) -> Any:
    """The class of the config of a model of moeify's own architecture."""
    dense, mixing = declared.get("dense_model_type"), declared.get("mixing", "hard")
    if not isinstance(dense, str) or dense not in families.names():
        raise _refused(file, "dense_model_type", dense, f"one of {', '.join(families.names())}")
    if mixing not in get_args(Style):
        raise _refused(file, "mixing", mixing, f"one of {', '.join(get_args(Style))}")
    return config_class(dense)


def _check_declared(file: str | Path, declared: Mapping[str, Any], config_class: Any) -> None:
    """Check what must be right before transformers makes lists of so many layers or labels from it."""
    for name, value in declared.items():
        # They would replace what the config does.
        if name.startswith("__") or name == "attribute_map" or callable(getattr(config_class, name, None)):
            raise InputError(f"{file}: {shown(name)} is not a field of a config", "remove it from the file")
        _check_extra(file, name, value)
    _check_types(file, declared, config_class)
    _check_numbers(file, declared, config_class)
    kinds, layers = declared.get("layer_types"), declared.get(_stored_name(config_class, "num_hidden_layers"))
    if isinstance(kinds, list) and isinstance(layers, int) and len(kinds) != layers:
        raise _refused(file, "layer_types", kinds, f"one for each of {layers:,} layers, not {len(kinds):,}")


def _check_extra(file: str | Path, name: str, value: Any) -> None:
    """Check fields that transformers takes beside those that its classes declare."""
    if value is None:
        return
    if name in MAPPINGS and not isinstance(value, dict):
        raise _refused(file, name, value, "a mapping or null")
    if name == "layer_types" and not (isinstance(value, list) and all(isinstance(kind, str) for kind in value)):
        raise _refused(file, name, value, "a list of texts or null")
    if name == "num_labels" and not _whole(value, *RANGES[name]):
        raise _refused(file, name, value, _between(*RANGES[name]))
    if name == "output_attentions" and not isinstance(value, bool):
        raise _refused(file, name, value, "true, false or null")
    if name in ("dtype", "torch_dtype") and not _is_float_type(value):
        raise _refused(file, name, value, 'a floating-point type of torch, such as "bfloat16"')
    if name.strip("_") in IMPLEMENTATIONS and not isinstance(value, str):
        raise _refused(file, name, value, "a text or null")


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
            raise _refused(file, name, value, " or ".join(words)) from error


@lru_cache
def _annotations(config_class: Any) -> dict[str, Any]:
    """Type of every field; those of the base class are texts, which transformers' own validation takes for anything."""
    base = get_type_hints(PreTrainedConfig, localns={"torch": torch})
    return {f.name: base.get(f.name, f.type) if isinstance(f.type, str) else f.type for f in fields(config_class)}


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _plain(kind: Any) -> Any:
    return get_origin(kind) or kind


def _check_numbers(file: str | Path, values: Mapping[str, Any], config_class: Any) -> None:
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
                raise _refused(file, name, value, _between(*low_high))


def _check_float(file: str | Path, name: str, value: Any) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= torch.finfo().max
    if name.endswith(("_eps", "_epsilon")):
        # Of a norm whose inputs may all be zero.
        if not (fits and 0 < value < 1):
            raise _refused(file, name, value, "a number above 0 and below 1")
    elif name.endswith(("dropout", "_pdrop")):
        if not (fits and 0 <= value <= 1):
            raise _refused(file, name, value, "a number from 0 to 1")
    elif not fits:
        raise _refused(file, name, value, "a finite number that float32 holds")


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


def _check_relations(file: str | Path, config: Any) -> None:
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
            raise _refused(file, name, value, f"one of {', '.join(ACT2FN)}")
    active, experts = getattr(config, "num_experts_per_tok", None), _experts(config)
    if isinstance(active, int) and experts is not None and active > experts:
        raise _refused(file, "num_experts_per_tok", active, f"at most the number of experts, {experts:,}")
    by_layer, layers = getattr(config, BY_LAYER, None), getattr(config, "num_hidden_layers", None)
    fits = isinstance(by_layer, list) and all(_whole(number, 0, experts or 0) for number in by_layer)
    if by_layer is not None and not (fits and len(by_layer) == layers):
        raise _refused(file, BY_LAYER, by_layer, f"null or {layers} whole numbers up to {experts}")


def _experts(config: Any) -> int | None:
    values = (getattr(config, name, None) for name in EXPERTS)
    return next((value for value in values if isinstance(value, int) and value), None)


def _check_tokens(file: str | Path, config: Any) -> None:
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
                raise _refused(file, name, token, f"null or a token of the vocabulary, 0 to {vocabulary - 1:,}")
            warn(f"{file}: {name} {token:,} is outside the vocabulary of {vocabulary:,} tokens; it is kept as it is")


def _check_sizes(file: str, folder: Path, config: Any) -> None:
    """Refuse sizes that the weights beside the config cannot have, before anything is made of them."""
    try:
        num_bytes = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    except OSError:
        # Said by whoever reads the weights.
        return
    hidden = getattr(config, "hidden_size", None)
    if not num_bytes or not isinstance(hidden, int):
        return
    for name in ("vocab_size", "num_hidden_layers", *EXPERTS):
        rows = getattr(config, name, None)
        if isinstance(rows, int) and rows * hidden > max(FEW_NUMBERS, num_bytes * NUMBERS_PER_BYTE):
            raise InputError(
                f"{file}: {name} is {rows:,} and hidden_size {hidden:,}, the weights have {num_bytes:,} bytes",
                "config.json and the weights are not of the same model, or the weights are cut off",
            )
