"""JSON files of a model folder, read as what they may be: anything."""

import json
from pathlib import Path
from typing import Any

from moeify.errors import InputError

# Of values in a message.
LONGEST = 60


def read_mapping(file: Path, *, limit_bytes: int) -> dict[str, Any]:
    """The mapping in a JSON file.

    Args:
        file: its path.
        limit_bytes: of its size.

    Raises:
        InputError: it is missing, too large, no file, not UTF-8, not JSON, no mapping, or names a key twice.
    """
    try:
        text = _read(file, limit_bytes)
        values = json.loads(text, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not JSON: byte {error.start:,} is not UTF-8", "fetch it again") from error
    except RecursionError as error:
        raise InputError(f"{file} is not JSON of a model: it is nested too deeply", "fetch it again") from error
    except OSError as error:
        raise InputError(
            f"cannot read {file}: {error.strerror or error}", "expected a file that can be read"
        ) from error
    except ValueError as error:
        # Numbers of thousands of digits among them.
        raise InputError(f"{file} is not JSON: {error}", "fetch it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} holds {shown(values)}, expected a mapping", "fetch it again")
    return values


def _read(file: Path, limit_bytes: int) -> str:
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "is not there" if not file.exists() else "is not a file"
        raise InputError(f"{file} {kind}, expected a JSON file", "expected a Hugging Face model folder")
    if (size := file.stat().st_size) > limit_bytes:
        raise InputError(f"{file} has {size:,} bytes, expected at most {limit_bytes:,}", "fetch it again")
    return file.read_bytes().decode("utf-8")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is there twice: which one counts differs between readers."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return values


def shown(value: Any) -> str:
    """A value as JSON writes it, short enough for a message."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
