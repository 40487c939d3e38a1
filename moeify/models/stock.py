"""The one door to models as stock transformers loads them; its own report of what it found decides what is right.

Nothing of a model's folder runs: no code, no pickle, no adapter, no kernel that a config names. No other file of this
package calls `from_pretrained` of a model on a folder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from moeify.errors import InputError, first_line, warn
from moeify.models.config import load_config
from moeify.models.files import find_shards
from moeify.models.generation import generation_arguments
from moeify.models.heads import auto_class, class_of
from moeify.words import printable


@dataclass(frozen=True)
class Report:
    """What the loader of transformers found; names in order.

    Args:
        missing: tensors that the model needs and that are not stored: random numbers would stand there.
        unexpected: stored, but not loaded; without those that the architecture lists as no longer needed.
        mismatched: stored in another shape, by name: the stored shape and that of the model.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> "Report":
        """From `output_loading_info`."""
        mismatched = {name: (tuple(stored), tuple(needed)) for name, stored, needed in info["mismatched_keys"]}
        return cls(
            tuple(sorted(info["missing_keys"])),
            tuple(sorted(info["unexpected_keys"])),
            dict(sorted(mismatched.items())),
        )

    def check(self, model_type: str) -> None:
        """Refuse what is not whole.

        Raises:
            InputError: tensors are missing or have another shape.
        """
        if self.missing:
            raise InputError(
                f"{len(self.missing):,} tensors of {model_type} are missing, the first is {self.missing[0]}",
                "fetch the checkpoint again; adapters and partial checkpoints cannot be used",
            )
        for name, (stored, needed) in self.mismatched.items():
            raise InputError(
                f"{name} has shape {list(stored)}, config.json says {list(needed)}",
                "config.json and the weights are not of the same model",
            )

    def warn_of_unexpected(self) -> None:
        """Say which tensors the model does not have."""
        if self.unexpected:
            warn(
                f"{len(self.unexpected):,} tensors are not part of the model, the first is "
                f"{printable(self.unexpected[0])}: they are left out, as transformers does"
            )


def load(path: Path, *, dtype: torch.dtype | str = torch.float32, **arguments: Any) -> Any:
    """Load a model, every tensor of it from the disk.

    Args:
        path: its folder.
        dtype: of the weights; `auto` keeps the checkpoint's.
        arguments: passed on to `from_pretrained`.

    Raises:
        InputError: transformers cannot load it, or its report is not clean.
    """
    model, report = load_with_report(path, dtype=dtype, **arguments)
    report.check(model.config.model_type)
    report.warn_of_unexpected()
    return model


def load_with_report(
    path: Path, *, dtype: torch.dtype | str = torch.float32, config: Any = None, **arguments: Any
) -> tuple[Any, Report]:
    """Load a model and leave it to the caller to judge the loader's report.

    Args:
        path: its folder.
        dtype: of the weights.
        config: instead of the folder's own.
        arguments: passed on to `from_pretrained`.

    Raises:
        InputError: there is something that transformers would run, or it cannot load the rest.
    """
    if "gguf_file" not in arguments:
        config = config or load_config(path)
        auto_class(config)
        find_shards(path)
        arguments = {"config": config, **generation_arguments(path, config), **arguments}
    with _loading(str(path)):
        # A GGUF says nothing of its class but that it generates text.
        maker: Any = transformers.AutoModelForCausalLM if "config" not in arguments else auto_class(arguments["config"])
        loaded: Any = maker.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
    model, info = loaded
    return model, Report.of(info)


def load_gguf(file: Path) -> tuple[Any, Report]:
    """Load a GGUF in float32, to which it is dequantised.

    Args:
        file: alone in its folder and of a name that is nowhere else, because transformers looks for that name in the
            working folder first.
    """
    arguments: dict[str, Any] = {"gguf_file": file.name}
    if hasattr(transformers, "GgufConfig"):
        # Otherwise packed weights are computed with kernels from the hub, where there are any.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return load_with_report(file.parent, **arguments)


def placed(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], Report]:
    """Where the loader of transformers puts tensors of these names and shapes, without reading one.

    Each is stood in for by a tensor on the meta device that begins at a place of its own in its storage. What the
    loader renames keeps that place; what it computes from several does not.

    Args:
        config: of the model.
        shapes: of the stored tensors, by name.

    Returns:
        Stored name of each tensor of the model, where it is a stored tensor as it is; and the loader's report.
    """
    marks = dict(enumerate(sorted(shapes), start=1))
    stand_ins = {
        name: torch.empty(torch.Size(shapes[name]).numel() + mark, device="meta")[mark:].view(shapes[name])
        for mark, name in marks.items()
    }
    with _loading(f"a {config.model_type} of this config.json"):
        loaded: Any = class_of(config).from_pretrained(
            None,
            config=config,
            state_dict=dict(stand_ins),
            dtype=torch.float32,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, info = loaded
    stored = {}
    for name, tensor in model.state_dict().items():
        origin = marks.get(tensor.storage_offset())
        if origin is not None and tensor.shape == stand_ins[origin].shape and tensor.is_contiguous():
            stored[name] = origin
    stored |= _padded(model, stored, set(stand_ins) - set(info["unexpected_keys"]), stand_ins)
    # Of tied tensors that are both not there, one is needed.
    tied = {name for name, source in model.all_tied_weights_keys.items() if source in info["missing_keys"]}
    return stored, Report.of({**info, "missing_keys": info["missing_keys"] - tied})


def _padded(
    model: Any, stored: Mapping[str, str], known: set[str], shapes: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Of the bias of a head that is tied to the embedding, which the loader pads by nothing and so copies."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    left = known - set(stored.values())
    return {
        name: name
        for name, tensor in model.state_dict().items()
        if name in left and bias is not None and tensor.shape == bias.shape == shapes[name].shape
    }


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn whatever the readers of transformers stumble over into an error with a hint."""
    try:
        with quiet():
            yield
    except ImportError as error:
        message = f"transformers needs another package to load {what}: {first_line(error)}"
        raise InputError(message, "install it beside moeify") from error
    except Exception as error:
        memory = isinstance(error, MemoryError) or "allocate memory" in str(error)
        hint = "it needs more memory than there is" if memory else "fetch the model again"
        raise InputError(f"transformers cannot load {what}: {first_line(error)}", hint) from error


@contextmanager
def quiet() -> Iterator[None]:
    """What does not fit is read from the loader's report; its table of it, and its bars, are not for the user."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
