"""The only place that reads dense checkpoints: folder, hub id, GGUF file or the embedded model, tensor by tensor.

Everything that can be wrong with a checkpoint is found here, before any work: its kind, its family, missing or
truncated shards, missing tensors, wrong shapes. NaN and infinite weights are found when a tensor is read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moeify import families
from moeify.cache import cache_dir, made_once
from moeify.errors import InputError
from moeify.families import Family, Sites
from moeify.models.attention import Attention, attention_of
from moeify.models.ffn import FFNWeights, tensor_names, unpack
from moeify.options import Track, untracked

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What a user would need beside the weights; copied as it is.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
HUB_PATTERNS = ["*.safetensors", SINGLE_FILE + ".index.json", "config.json", "generation_config.json", *TOKENIZER_FILES]


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

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            InputError: the folder has none that transformers can load without remote code.
        """
        return load_tokenizer(self.path)


def fingerprint(path: Path, shards: Mapping[str, Path]) -> str:
    """sha256 over config and each shard's name, size, modification time and header; enough to notice a change."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for shard in sorted(set(shards.values())):
        stat = shard.stat()
        digest.update(f"{shard.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


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
    _check_tensors(checkpoint)
    return checkpoint


def load_config(path: Path) -> Any:
    """The transformers config of a folder; code inside the folder is never run."""
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"no config.json in {path}", "expected a Hugging Face model folder")
    try:
        declared = json.loads(file.read_text())
        if "model_type" not in declared:
            raise InputError(f"{file} has no model_type", "expected the config of a transformers model")
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise InputError(f"{file} is not JSON: {error}", "fetch it again") from error
        raise InputError(
            f"transformers cannot read {file}: {_first_line(error)}", f"supported: {', '.join(families.names())}"
        ) from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        InputError: the folder has none that transformers can load without remote code.
    """
    try:
        # False, not the default: that one asks whoever sits at the terminal, and runs the code at a "y".
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no usable tokenizer in {path}: {error}", "copy tokenizer.json beside the weights") from error


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
