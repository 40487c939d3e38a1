"""A model's defaults for generating text; no work of moeify's needs them, so broken ones are replaced, not refused."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from moeify.errors import InputError, first_line, warn
from moeify.models.json_files import read_mapping

GENERATION_FILE = "generation_config.json"
LIMIT_BYTES = 1 << 24


def usable_generation(path: Path) -> bool:
    """Whether a folder has a file of defaults that stock transformers loads; warns of one that it does not load."""
    file = path / GENERATION_FILE
    if not file.exists() and not file.is_symlink():
        return False
    try:
        read_mapping(file, limit_bytes=LIMIT_BYTES)
        GenerationConfig.from_pretrained(path).validate()
    except InputError as error:
        fault = str(error)
    except Exception as error:
        # Values of any kind reach code of any kind.
        fault = f"{file}: {first_line(error)}"
    else:
        return True
    warn(f"{fault}; it is left out, and made from config.json instead")
    return False


def ends_of(model: Any, tokenizer: Any = None) -> set[int]:
    """The tokens by which a loaded model ends a text, as its folder says."""
    values = (model.generation_config.eos_token_id, getattr(tokenizer, "eos_token_id", None))
    tokens = [token for value in values for token in (value if isinstance(value, list) else [value])]
    return {token for token in tokens if isinstance(token, int)}


def default_generation(config: Any) -> GenerationConfig:
    """The defaults that a model's config implies."""
    return GenerationConfig.from_model_config(config)


def generation_arguments(path: Path, config: Any) -> dict[str, Any]:
    """What `from_pretrained` of a folder needs so that a broken file of defaults does not stop it."""
    exists = (path / GENERATION_FILE).exists()
    return {"generation_config": default_generation(config)} if exists and not usable_generation(path) else {}
