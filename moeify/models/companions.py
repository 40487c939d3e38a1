"""Which files beside config and weights belong to a model, and are carried wherever it goes."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

# Of the tokenizer, whatever its kind.
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer.[0-9]*.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/*.jinja",
    "additional_chat_templates/*.jinja",
)
# What other inputs are made of, and what a user may do with the model.
OTHER_PATTERNS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "normalizer.json",
    # Of sentence-transformers: how an embedding is made of the last hidden states.
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]_Pooling/config.json",
    "LICENSE*",
    "LICENCE*",
    "License*",
    "NOTICE*",
    "Notice*",
    "USE_POLICY*",
)
COMPANION_PATTERNS = (*TOKENIZER_PATTERNS, *OTHER_PATTERNS)
# Never carried, whatever they are called: code, and weights of every kind.
REFUSED_SUFFIXES = frozenset(
    (
        *(".py", ".pyc", ".so", ".sh", ".pkl", ".pickle", ".npz", ".npy"),
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack"),
    )
)


def companion_names(folder: Path) -> list[str]:
    """Names of the companions in a folder, relative, in order; no file is opened.

    Names alone are matched, so that a link is among them: `moeify.models.files.inside` says whether it may be followed.
    """
    return _matching(folder, COMPANION_PATTERNS)


def tokenizer_names(folder: Path) -> list[str]:
    """Those of the tokenizer."""
    return _matching(folder, TOKENIZER_PATTERNS)


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_symlink() or path.is_file()}
    names = {path.relative_to(folder).as_posix() for path in files}
    return sorted(name for name in names if PurePosixPath(name).suffix.lower() not in REFUSED_SUFFIXES)
