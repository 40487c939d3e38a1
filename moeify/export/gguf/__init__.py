"""A GGUF file of a checkpoint, as llama.cpp reads it, by the gguf package alone."""

from importlib.util import find_spec

from moeify.errors import InputError


def check_package() -> None:
    """Raise InputError if the gguf package is not installed; to be called before the modules here are imported."""
    if find_spec("gguf") is None:
        raise InputError("a GGUF needs the gguf package", "pip install 'moeify[gguf]'")
