"""The only place that reads dense checkpoints: folder, hub id, GGUF file or the embedded model, tensor by tensor.

Everything that can be wrong with a checkpoint is found here, before any work: its kind, its family, missing or
truncated shards, missing tensors, wrong shapes. NaN and infinite weights are found when a tensor is read.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeify import families
from moeify.errors import InputError, warn
from moeify.families import Blocks, Family, Sites, lists_of, sites_of
from moeify.modeling.modeling_moeify import blocks_in
from moeify.models.attention import Attention, attention_of
from moeify.models.config import check_computed, check_layers, compute, computed_names, empty_model, load_config
from moeify.models.ffn import FFNWeights, padded, tensor_names, unpack
from moeify.models.files import FLOAT_DTYPES, Stored, find_shards, locate, read_headers
from moeify.models.fingerprint import Fingerprint
from moeify.models.heads import BASE, PAIR_MODEL, SPEECH_MODEL, auto_name
from moeify.models.stock import placed
from moeify.models.tokenizer import load_tokenizer
from moeify.options import Track, untracked
from moeify.words import printable

# Of two embeddings that are compared, at a time.
COMPARED_ROWS = 4096


@dataclass(frozen=True)
class DenseModel:
    """A dense model, opened once and handed on; no weight is loaded before it is asked for.

    Args:
        name: as the user gave it.
        path: the folder it is in.
        config: its transformers config.
        family: where its FFNs are.
        stored: where each tensor is, by its name in the stock model.
        files: fingerprint of its files when it was opened.
        dropped: numbers of the layers that were left out of it.
        padding: neurons of zeros that stand behind those of every FFN.
    """

    name: str
    path: Path
    config: Any
    family: Family
    stored: Mapping[str, Stored]
    files: Fingerprint
    dropped: tuple[int, ...] = field(default=(), kw_only=True)
    padding: int = field(default=0, kw_only=True)

    @property
    def text_config(self) -> Any:
        """The part of the config that is about the blocks; all of it where it has no parts."""
        return self.config.get_text_config()

    def config_with(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Values of its config, with others for what is about the blocks."""
        values: dict[str, Any] = self.config.to_dict()
        if self.text_config is self.config:
            return {**values, **changes}
        return {**values, "text_config": {**values["text_config"], **changes}}

    @cached_property
    def num_layers(self) -> int:
        """Blocks of all lists."""
        if not self.family.is_pair:
            return int(self.text_config.num_hidden_layers)
        return self.blocks.starts[-1] + len(self.skeleton.get_submodule(self.blocks.names[-1]))

    @property
    def activation(self) -> str:
        return self.family.activation_of(self.text_config)

    @property
    def sites(self) -> tuple[Sites, ...]:
        """Of each list of blocks."""
        return sites_of(self.blocks, self.family.read, self.family.write)

    @cached_property
    def blocks(self) -> Blocks:
        """The blocks, by their names in the stock model."""
        return blocks_of(self.skeleton, self.family)

    @cached_property
    def num_neurons(self) -> int:
        """Inner width of an FFN, from its tensors: not every config says it. With padding."""
        return self.ffn_shapes.num_neurons

    @cached_property
    def hidden_size(self) -> int:
        return self.ffn_shapes.hidden_size

    @cached_property
    def skeleton(self) -> Any:
        """The stock model on the meta device, its buffers real; layers are filled one at a time."""
        model = empty_model(self.config, buffers=True)
        compute(model, self.computed(model))
        return model

    def computed(self, model: Any) -> list[str]:
        """Tensors that the stock model computes because they are not stored."""
        return [name for name in computed_names(model) if name not in self.stored]

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """Name of a tensor that is not on disk -> name of the tensor that it shares."""
        return dict(self.skeleton.all_tied_weights_keys)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor the stock model needs from disk."""
        absent = {*self.tied, *self.computed(self.skeleton)}
        state = self.skeleton.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in absent}

    @cached_property
    def embedding(self) -> str:
        """Name of the tensor that token ids are looked up in."""
        module = self.skeleton.get_input_embeddings()
        names: list[str] = [name for name, part in self.skeleton.named_modules() if part is module]
        return f"{names[0]}.weight"

    @cached_property
    def attention(self) -> Attention:
        return attention_of(self.text_config, [name.removeprefix(f"{self.blocks.names[0]}.") for name in self.shapes])

    @cached_property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the first layer's FFN, which the converted checkpoint keeps."""
        return self.dtype_of(f"{self.block(0)}.{self.family.ffn.up}.weight")

    def dtype_of(self, name: str) -> torch.dtype:
        """Type of a stored tensor."""
        return FLOAT_DTYPES[self.stored[name].dtype]

    @cached_property
    def num_of_dtype(self) -> dict[str, int]:
        """How many tensors are stored as which type, in the words of safetensors; the most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.stored.values()).most_common())

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def block(self, layer: int) -> str:
        """Name of the module that the FFN of a block lies in, usually the block itself."""
        return self.blocks.site(layer)

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors; the file is closed again so that its pages do not stay in memory.

        Raises:
            InputError: a tensor holds NaN or infinity, or its file can no longer be read.
        """
        tensors = {}
        for name in names:
            stored = self.stored[name]
            try:
                with safe_open(stored.file, framework="pt") as reader:
                    tensor = reader.get_tensor(stored.name)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"cannot read {name} from {stored.file}: {error}", "fetch the checkpoint again"
                ) from error
            # One pass and no copy; NaN shows in both ends.
            if not all(end.isfinite() for end in tensor.aminmax()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise InputError(
                    f"{name} holds {bad:,} NaN or infinite values of {tensor.numel():,}",
                    f"the checkpoint is damaged: fetch {stored.file.name} again",
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
        return padded(unpack(self.family.ffn, self.block(layer), tensors, layer, self.activation), self.padding)

    def unpadded(self, ffn: FFNWeights) -> FFNWeights:
        """A whole FFN of this model as its own architecture has it."""
        return ffn.neurons(slice(self.num_neurons - self.padding)) if self.padding else ffn

    @cached_property
    def ffn_shapes(self) -> FFNWeights:
        """The first FFN on the meta device: what it has, and how large."""
        return self._unpack(0, {name: torch.empty(self.shapes[name], device="meta") for name in self.ffn_names(0)})

    def fingerprint(self) -> str:
        """Of its files when it was opened."""
        return self.files.value

    def check_unchanged(self) -> None:
        """Make sure that what was read is one model: to be called when all is read, before a result is kept.

        Raises:
            InputError: a file was changed, replaced or removed since the model was opened; the message names it.
        """
        self.files.check_unchanged()

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: the folder has none that transformers can load without remote code, or it is another model's.
        """
        return load_tokenizer(self.path)


def blocks_of(model: Any, family: Family) -> Blocks:
    """The blocks of a model that is loaded, or empty; with a head or without."""
    names = [family.blocks] if isinstance(family.blocks, str) else family.blocks
    lists = lists_of(blocks_in(model, name) for name in names)
    lengths = [len(model.get_submodule(name)) for name, _ in lists[:-1]]
    return Blocks(lists, tuple(sum(lengths[:place]) for place in range(len(lists))))


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
    family = families.of(config)
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{model} is quantised ({config.quantization_config.get('quant_method', 'unknown method')})",
            "quantise after the conversion, not before: start from the unquantised checkpoint",
        )
    shards = find_shards(path)
    if family.is_pair and (name := auto_name(config)) not in (PAIR_MODEL, SPEECH_MODEL, BASE):
        raise InputError(
            f"{model} has an encoder, a decoder and a head for {name.removeprefix('AutoModelFor')}",
            "only those that write, or have no head, are split",
        )
    auto_name(config)
    headers = read_headers(shards)
    check_layers(config, family.blocks, headers)
    config, stored = _tensors(config, headers)
    dense = DenseModel(str(model), path, config, family, stored, Fingerprint.take(path, shards))
    _check_widths(dense)
    return dense


def _check_widths(dense: DenseModel) -> None:
    """Refuse an encoder and a decoder with FFNs of other sizes."""
    if not dense.family.is_pair:
        return
    first, last = ([dense.shapes[name] for name in dense.ffn_names(layer)] for layer in (0, dense.num_layers - 1))
    if first != last:
        sizes = [" x ".join(map(str, shapes[0])) for shapes in (first, last)]
        raise InputError(
            f"FFNs of the encoder have {sizes[0]} weights, those of the decoder {sizes[1]}",
            "expected FFNs of one size: one layout is for all layers",
        )


def _tensors(config: Any, headers: Mapping[str, Stored]) -> tuple[Any, dict[str, Stored]]:
    """Which stored tensor is which of the stock model, by its loader's own report; and the config, untied if need be.

    Raises:
        InputError: the loader finds fault with the tensors, makes some of others, or leaves out a head.
    """
    check_computed(config)
    names, report = placed(config, {name: tensor.shape for name, tensor in headers.items()})
    report.check(config.model_type)
    skeleton = empty_model(config, buffers=True)
    _refuse_heads(skeleton, report.unexpected, headers)
    report.warn_of_unexpected()
    for head, embedding in skeleton.all_tied_weights_keys.items():
        both = head in names and embedding in names and names[head] != names[embedding]
        if both and not _are_equal(headers[names[head]], headers[names[embedding]]):
            config.tie_word_embeddings = False
            warn(f"{head} differs from {embedding}, though config.json ties them: both stay, as in transformers")
    tied = skeleton.all_tied_weights_keys if getattr(config, "tie_word_embeddings", False) else {}
    absent, stored = {*tied, *(name for name in computed_names(skeleton) if name not in names)}, {}
    for name in (name for name in skeleton.state_dict() if name not in absent):
        if name not in names:
            raise InputError(
                f"transformers makes {name} of tensors with other names or shapes while it loads them",
                "load the model once with transformers, save it with save_pretrained and give that folder",
            )
        stored[name] = headers[names[name]]
        if stored[name].dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{name} is stored as {stored[name].dtype}, expected one of {', '.join(FLOAT_DTYPES)}",
                "quantise after the conversion, not before: start from the unquantised checkpoint",
            )
    return config, stored


def _refuse_heads(skeleton: Any, unexpected: Iterable[str], headers: Mapping[str, Stored]) -> None:
    """Refuse what reads the last hidden state beside the model's own head: the result would lose it."""
    own = {name for name, _ in skeleton.named_children()}
    hidden_size = skeleton.config.get_text_config().hidden_size
    for name in unexpected:
        shape = headers[name].shape if name in headers else ()
        if name.split(".")[0] not in own and len(shape) == 2 and shape[1] == hidden_size:
            raise InputError(
                f"{printable(name)} belongs to a head that {type(skeleton).__name__} does not have",
                "the result would lose it: name the model's class in config.json, or remove the head's tensors",
            )


def _are_equal(one: Stored, other: Stored) -> bool:
    """Whether two matrices hold the same numbers; reads a slice at a time."""
    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="pt") as first, safe_open(other.file, framework="pt") as second:
        slices = first.get_slice(one.name), second.get_slice(other.name)
        for start in range(0, one.shape[0], COMPARED_ROWS):
            left, right = (rows[start : start + COMPARED_ROWS].float() for rows in slices)
            if not torch.equal(left, right):
                return False
    return True
