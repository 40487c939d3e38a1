"""The config of a model, checked before anything is made from it: every field has a type and a range.

Fields are checked in config_fields.py; here, how they fit the weights beside them. All of it reads two small files and
allocates nothing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeify import families
from moeify.errors import InputError, first_line
from moeify.families import lists_of
from moeify.modeling.configuration_moeify import MODEL_TYPE, config_class
from moeify.models.config_fields import (
    DECODER_LAYERS,
    EXPERTS,
    check_declared,
    check_numbers,
    check_relations,
    check_tokens,
    refused,
)
from moeify.models.heads import auto_class, class_of
from moeify.models.json_files import read_mapping, shown
from moeify.models.rotary import rotary_fault
from moeify.options import Style

CONFIG_FILE = "config.json"
LIMIT_BYTES = 1 << 24
# Of a tensor that is not stored: 16,384 positions of 1,024 numbers.
LIMIT_COMPUTED = 1 << 24
# How the name of a tensor begins that belongs to another part than the one that reads text.
TOWER = re.compile(r"^(?:model\.)?(?:vision|visual|audio)")
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
        check_declared(part, values, its_class)
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
        check_numbers(part, {field.name: getattr(one, field.name, None) for field in fields(one)}, type(one))
        check_relations(part, one)
        if fault := rotary_fault(one):
            raise refused(part, *fault)
        check_tokens(part, one)
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


def computed_names(model: Any) -> list[str]:
    """Parameters that a stock model never saves and computes itself, as Marian does its positions."""
    never = model._keys_to_ignore_on_save or ()
    return [name for name, _ in model.named_parameters() if name in never]


def check_computed(config: Any) -> None:
    """Refuse a config by which the stock model would compute more than any does; no file bounds it.

    Raises:
        InputError: it would.
    """
    if not class_of(config)._keys_to_ignore_on_save:
        return
    model = empty_model(config, buffers=False)
    for name in computed_names(model):
        if (size := model.get_parameter(name).numel()) > LIMIT_COMPUTED:
            raise InputError(
                f"{name} would be {size:,} numbers, expected at most {LIMIT_COMPUTED:,}",
                "config.json gives its sizes: correct max_position_embeddings",
            )


@torch.no_grad()
def compute(model: Any, names: Iterable[str]) -> None:
    """Give a model without weights those of `computed_names`, in place."""
    for name in names:
        place, _, attribute = name.rpartition(".")
        module = model.get_submodule(place)
        shape = module.get_parameter(attribute).shape
        setattr(module, attribute, nn.Parameter(torch.empty(shape), requires_grad=False))
        model._init_weights(module)


def check_layers(config: Any, blocks: str | Iterable[str], names: Iterable[str]) -> None:
    """Refuse layers that differ in size, and weights with another number of them, before a model is made of a config.

    Args:
        config: from `load_config`.
        blocks: of the family; names of tensors may have other prefixes.
        names: of all tensors.
    """
    if getattr(config, "is_heterogeneous", False):
        raise InputError("config.json has a per_layer_config, expected layers of one size", "start from another model")
    layers, lists = config.get_text_config(), lists_of(blocks)
    names = [name for name in names if layers is config or not TOWER.search(name)]
    counts = [int(layers.num_hidden_layers)]
    if len(lists) > 1:
        counts.append(int(next(value for name in DECODER_LAYERS if (value := getattr(config, name, None)) is not None)))
    for (name, _), expected in zip(lists, counts, strict=True):
        *part, blocks_name = name.split(".")
        part_name = re.escape(f"{part[-1]}.") if len(lists) > 1 else r"(?:^|\.)"
        # Some names on disk are of an older transformers, which called the list `layer`.
        number = re.compile(rf"{part_name}{re.escape(blocks_name.removesuffix('s'))}s?\.(\d+)\.")
        count = len({found[1] for one in names if (found := number.search(one))})
        if count != expected:
            where = f" in the {part[-1]}" if len(lists) > 1 else ""
            raise InputError(
                f"config.json says {expected:,} layers{where}, the weights have {count:,}",
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


def _class_of(file: Path, declared: Mapping[str, Any]) -> Any:
    """transformers' class of this config."""
    if "model_type" not in declared:
        raise InputError(f"{file} has no model_type", "expected the config of a transformers model")
    name = declared["model_type"]
    if not isinstance(name, str):
        raise refused(file, "model_type", name, "the name of an architecture")
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
            raise refused(file, name, values, "a mapping")
        kind = values.get("model_type")
        # A class that is known reads what it finds, whatever that calls itself.
        if its_class is AutoConfig and kind is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
            raise refused(file, f"{name}.model_type", kind, "the name of an architecture")
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
        raise refused(file, "dense_model_type", dense, f"one of {', '.join(families.names())}")
    if mixing not in get_args(Style):
        raise refused(file, "mixing", mixing, f"one of {', '.join(get_args(Style))}")
    return config_class(dense)


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
