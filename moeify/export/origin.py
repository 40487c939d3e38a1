"""Where a model comes from, as far as a card may say it: its address on the hub, and the licence on its own card.

An address is written only if the model was opened there. A folder called org/name is none: whoever follows a card on
the hub, or a converter that copies it into a GGUF, would take it for a model of the hub.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from moeify.errors import InputError
from moeify.export.record import LAST_FILE, RECORD_FILE
from moeify.models.files import inside

# The head of a card is far smaller.
LIMIT_BYTES = 1 << 16
LONGEST = 300
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}")


@dataclass(frozen=True)
class Origin:
    """What a card says of the model that a checkpoint was made from.

    Args:
        base_model: its id on the hub, or "".
        licence: `license` and, where it is not a common one, `license_name` and `license_link`, as its card has them.
    """

    base_model: str = ""
    licence: Mapping[str, str] = field(default_factory=dict)


def origin_of(path: Path) -> Origin:
    """The origin of a model in a folder: of the hub's cache, that moeify wrote, or any other."""
    head = _head(path)
    # What moeify wrote names the model that it was made from, if that was on the hub.
    named = str(head.get("base_model")) if (path / RECORD_FILE).is_file() else ""
    return Origin(_hub_id(path) or (named if is_hub_id(named) else ""), _licence(head))


def is_hub_id(name: Any) -> bool:
    """Whether a model of the hub can be called so."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return str(name).count("/") == 1


def _hub_id(path: Path) -> str:
    """The id of a snapshot in the hub's cache, models--ORG--NAME/snapshots/REVISION; or ""."""
    folder, snapshots = path.absolute().parent.parent.name, path.absolute().parent.name
    name = folder.removeprefix("models--").replace("--", "/")
    return name if snapshots == "snapshots" and folder.startswith("models--") and is_hub_id(name) else ""


def _head(path: Path) -> dict[str, Any]:
    """The YAML at the beginning of a folder's card; nothing of a card that is missing or broken."""
    try:
        with inside(path, LAST_FILE).open("rb") as opened:
            text = opened.read(LIMIT_BYTES).decode("utf-8", "replace")
        block = re.match(r"---\r?\n(.*?)\n---\s*$", text, re.DOTALL | re.MULTILINE)
        values = yaml.safe_load(block[1]) if block else None
    except (InputError, OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _licence(head: Mapping[str, Any]) -> dict[str, str]:
    licence = head.get("license")
    if not isinstance(licence, str) or not LICENCE.fullmatch(licence):
        return {}
    further = {name: head.get(name) for name in ("license_name", "license_link")}
    fitting = {n: v for n, v in further.items() if isinstance(v, str) and v.isprintable() and 0 < len(v) <= LONGEST}
    return {"license": licence, **fitting}
