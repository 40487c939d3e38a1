"""The only place that reads dense checkpoints: folder, hub id, GGUF file or the embedded model, tensor by tensor.

Everything that can be wrong with a checkpoint is found here, before any work: its kind, its family, missing or
truncated shards, missing tensors, wrong shapes. NaN and infinite weights are found when a tensor is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeify import families
from moeify.errors import InputError
from moeify.families import Family, Sites
from moeify.models.attention import Attention, attention_of
from moeify.models.ffn import FFNWeights, tensor_names, unpack
from moeify.models.files import FLOAT_DTYPES, find_shards, fingerprint, load_config, load_tokenizer, locate
from moeify.options import Track, untracked


@dataclass(frozen=True)
class DenseModel:
    """A dense model, opened once and handed on; no weight is loaded before it is asked for.

    Args:
        name: as the user gave it.
        path: the folder it is in.
        config: its transformers config.
        family: where its FFNs are.
        shards: shard file of every tensor, by tensor name.
    """

    name: str
    path: Path
    config: Any
    family: Family
    shards: Mapping[str, Path]

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def activation(self) -> str:
        return str(getattr(self.config, self.family.activation))

    @property
    def sites(self) -> Sites:
        return self.family.sites

    @cached_property
    def num_neurons(self) -> int:
        """Inner width of an FFN, from its tensors: not every config says it."""
        return self.ffn_shapes.num_neurons

    @cached_property
    def hidden_size(self) -> int:
        return self.ffn_shapes.hidden_size

    @cached_property
    def skeleton(self) -> Any:
        """The stock model on the meta device, its buffers real; layers are filled one at a time."""
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(self.config).eval()

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Name of a tensor that is not on disk -> name of the tensor that it shares."""
        return dict(self.skeleton.all_tied_weights_keys)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor the stock model needs from disk."""
        state = self.skeleton.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in self.tied}

    @cached_property
    def embedding(self) -> str:
        """Name of the tensor that token ids are looked up in."""
        module = self.skeleton.get_input_embeddings()
        names: list[str] = [name for name, part in self.skeleton.named_modules() if part is module]
        return f"{names[0]}.weight"

    @cached_property
    def attention(self) -> Attention:
        return attention_of(self.config, self.shapes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the first layer's FFN, which the converted checkpoint keeps."""
        name = f"{self.block(0)}.{self.family.ffn.up}.weight"
        with safe_open(self.shards[name], framework="pt") as reader:
            return FLOAT_DTYPES[reader.get_slice(name).get_dtype()]

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def block(self, layer: int) -> str:
        """Name of a block, which all its tensors begin with."""
        return f"{self.family.blocks}.{layer}"

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors; the file is closed again so that its pages do not stay in memory.

        Raises:
            InputError: a tensor holds NaN or infinity, or its file can no longer be read.
        """
        tensors = {}
        for name in names:
            try:
                with safe_open(self.shards[name], framework="pt") as reader:
                    tensor = reader.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"cannot read {name} from {self.shards[name]}: {error}", "fetch the checkpoint again"
                ) from error
            # One pass and no copy; NaN shows in both ends.
            if not all(end.isfinite() for end in tensor.aminmax()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise InputError(
                    f"{name} holds {bad:,} NaN or infinite values of {tensor.numel():,}",
                    f"the checkpoint is damaged: fetch {self.shards[name].name} again",
                )
            tensors[name] = tensor
        return tensors

    def ffn_names(self, layer: int) -> tuple[str, ...]:
        """Names of the tensors of one FFN."""
        return tensor_names(self.family.ffn, self.block(layer), self.shapes)

    def ffn(self, layer: int) -> FFNWeights:
        """One FFN in the checkpoint's dtype."""
        return self._unpack(layer, self.get(self.ffn_names(layer)))

    def _unpack(self, layer: int, tensors: Mapping[str, Tensor]) -> FFNWeights:
        return unpack(self.family.ffn, self.block(layer), tensors, layer, self.activation)

    @cached_property
    def ffn_shapes(self) -> FFNWeights:
        """The first FFN on the meta device: what it has, and how large."""
        return self._unpack(0, {name: torch.empty(self.shapes[name], device="meta") for name in self.ffn_names(0)})

    def fingerprint(self) -> str:
        """Of its files."""
        return fingerprint(self.path, self.shards)

    @cached_property
    def _first_fingerprint(self) -> str:
        return self.fingerprint()

    def check_unchanged(self) -> None:
        """Compare the files with what they were when the model was opened.

        Raises:
            InputError: they changed, or are gone.
        """
        try:
            unchanged = self.fingerprint() == self._first_fingerprint
        except OSError:
            unchanged = False
        if not unchanged:
            raise InputError(
                f"{self.path} changed while it was read", "run the command again when nothing else writes there"
            )

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: the folder has none that transformers can load without remote code.
        """
        return load_tokenizer(self.path)


def open_dense(model: "str | Path | DenseModel", track: Track[Any] = untracked) -> DenseModel:
    """Open a dense checkpoint without loading a weight.

    Args:
        model: a folder, a .gguf file, a hub id or `builtin`; a model that is open already stays as it is.
        track: wraps the training of the embedded model, which happens once.

    Raises:
        InputError: it cannot be found, read or split; the message says which.
    """
    if isinstance(model, DenseModel):
        return model
    path = locate(str(model), track)
    config = load_config(path)
    family = families.find(config.model_type)
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{model} is quantised ({config.quantization_config.get('quant_method', 'unknown method')})",
            "quantise after the conversion, not before: start from the unquantised checkpoint",
        )
    checkpoint = DenseModel(str(model), path, config, family, find_shards(path))
    # To be known before anything is read.
    _ = checkpoint._first_fingerprint
    _check_tensors(checkpoint)
    return checkpoint


def _check_tensors(checkpoint: DenseModel) -> None:
    missing = sorted(set(checkpoint.shapes) - set(checkpoint.shards))
    if missing:
        raise InputError(
            f"{len(missing):,} tensors of {checkpoint.config.model_type} are missing, the first is {missing[0]}",
            "fetch the checkpoint again; adapters and partial checkpoints cannot be split",
        )
    by_file: dict[Path, list[str]] = {}
    for name in checkpoint.shapes:
        by_file.setdefault(checkpoint.shards[name], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as reader:
            for name in names:
                tensor = reader.get_slice(name)
                if tensor.get_dtype() not in FLOAT_DTYPES:
                    raise InputError(
                        f"{name} is stored as {tensor.get_dtype()}, expected one of {', '.join(FLOAT_DTYPES)}",
                        "quantise after the conversion, not before: start from the unquantised checkpoint",
                    )
                found, expected = tuple(tensor.get_shape()), checkpoint.shapes[name]
                if found != expected:
                    raise InputError(
                        f"{name} has shape {list(found)}, config.json says {list(expected)}",
                        "config.json and the weights are not of the same model",
                    )
