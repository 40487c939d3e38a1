"""Which GGUF architecture a checkpoint is, and what its header says of the model's sizes."""

import re
from typing import Any

import gguf

from moeify import families, targets
from moeify.errors import InputError, warn
from moeify.families import GGUFFormat
from moeify.version import __version__
from moeify.words import listing

# A file that has this key was written by moeify.
MARK = "moeify.version"
# Names of one function, which llama.cpp's GELU is.
TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")
# Fields of configs that say what is added to a variance.
LAYER_NORM_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# llama.cpp looks them up, and stops where one is missing, if a model's name holds phi3 or phi-3 (llama-vocab.cpp).
PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def format_of(config: Any) -> GGUFFormat:
    """What llama.cpp calls the architecture of a config.

    Raises:
        InputError: llama.cpp does not have it, or would compute something else.
    """
    kind = config.model_type
    if kind in targets.names():
        form = targets.find(kind).gguf
    else:
        form = families.find(kind).gguf if kind in families.names() else None
    if form is None:
        others = [name for name in targets.names() if targets.find(name).gguf]
        dense = [name for name in families.names() if families.find(name).gguf]
        raise InputError(
            f"no GGUF is written of {kind} models", f"targets that can: {listing(others)}; families: {listing(dense)}"
        )
    activation = _activation(config, form.activation)
    if activation != form.activation and not {activation, form.activation} <= {*TANH_GELUS}:
        raise InputError(
            f"llama.cpp's {form.architecture} computes {form.activation}, this model has {activation}",
            "llama.cpp cannot run it; transformers and vLLM do",
        )
    if reason := form.refuse(config):
        raise InputError(
            f"llama.cpp's {form.architecture} cannot run this checkpoint: {reason}",
            "split the model again with --engine llama.cpp",
        )
    return form


def _activation(config: Any, default: str) -> str:
    kind = config.model_type
    name = families.find(kind).activation if kind in families.names() else "hidden_act"
    return str(getattr(config, name, None) or default)


def add_sizes(writer: Any, form: GGUFFormat, config: Any) -> None:
    """Add what every architecture has, and what this one has besides.

    Args:
        writer: a gguf.GGUFWriter of the architecture.
        form: of the architecture.
        config: of the checkpoint.
    """
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_context_length(_context(form, config))
    writer.add_embedding_length(int(config.hidden_size))
    kind = config.model_type
    width = families.find(kind).width if kind in families.names() else "intermediate_size"
    # GPT-2 says nothing of the usual width.
    writer.add_feed_forward_length(int(getattr(config, width) or 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(getattr(config, "num_key_value_heads", None) or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    else:
        writer.add_layer_norm_eps(
            next(float(getattr(config, name)) for name in LAYER_NORM_EPS if hasattr(config, name))
        )
    writer.add_vocab_size(int(config.vocab_size))
    for name, value in form.keys(config).items():
        _add(writer, f"{form.architecture}.{name}", value)


def _context(form: GGUFFormat, config: Any) -> int:
    """Tokens that the model takes; where llama.cpp has no sliding window, those that see each other in any case."""
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if form.windows or not window or window >= context:
        return context
    warn(
        f"llama.cpp's {form.architecture} has no sliding window: the file says a context of {window:,} tokens instead "
        f"of {context:,}, within which both compute the same"
    )
    return int(window)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def add_origin(writer: Any, file_type: int) -> None:
    """Add the mark, and how the numbers lie.

    Args:
        writer: a gguf.GGUFWriter.
        file_type: gguf.LlamaFileType.
    """
    writer.add_string(MARK, __version__)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_name(writer: Any, name: str) -> None:
    """Add what the model is called, once `writer` has a vocabulary."""
    tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
    if not all(token in tokens for token in PHI3_TOKENS):
        name = re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
    writer.add_name(name)
