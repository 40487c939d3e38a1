"""The code of moeify's own architecture beside weights, for transformers without moeify (trust_remote_code=True)."""

from pathlib import Path
from typing import Any

import transformers

from moeify.modeling.modeling_moeify import AUTO_CLASSES, CODE_FILES, door


def code_files() -> dict[str, bytes]:
    """Contents of the files that lie beside the weights, by their names."""
    return {name: Path(__file__).with_name(name).read_bytes() for name in CODE_FILES}


def auto_map(dense_model_type: str) -> dict[str, str]:
    """What config.json says of the code: which class an Auto class of transformers finds in which file.

    Args:
        dense_model_type: decides which heads there are.
    """
    config_file, model_file = (name.removesuffix(".py") for name in CODE_FILES)
    mappings: dict[str, Any] = {
        auto: getattr(transformers, auto)._model_mapping._model_mapping for auto in AUTO_CLASSES
    }
    heads = [auto for auto, mapping in mappings.items() if dense_model_type in mapping]
    return {"AutoConfig": f"{config_file}.MoeifyConfig", **{auto: f"{model_file}.{door(auto)}" for auto in heads}}
