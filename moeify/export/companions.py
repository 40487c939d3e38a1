"""What a checkpoint gets beside config and weights; among it a tokenizer that cuts text as the source's does.

transformers chooses the class of a tokenizer by the model's type, and some classes put parts of their own in the place
of what tokenizer.json says. The same files may therefore cut text in another way beside another config.json. So they
are tried beside the config that they will lie beside. Where they would differ, the tokenizer that was loaded is written
as it is, for the class that adds nothing.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeify.cache import disk_errors
from moeify.errors import InputError, first_line, warn
from moeify.export.workspace import Workspace
from moeify.models.companions import companion_names, tokenizer_names
from moeify.models.config import load_config
from moeify.models.files import inside
from moeify.models.generation import GENERATION_FILE, default_generation, usable_generation
from moeify.models.heads import GENERATING, auto_name
from moeify.models.json_files import read_mapping
from moeify.models.same_tokens import token_difference
from moeify.models.tokenizer import LIMIT_BYTES, load_tokenizer, stock_tokenizer

CONFIG_FILE = "tokenizer_config.json"
# All versions of transformers and everything beside it knows this name, and reads tokenizer.json as it is.
GENERIC_CLASS = "PreTrainedTokenizerFast"
# What transformers 5 calls the same class; transformers 4 and engines pinned to it stop at the name.
NEW_GENERIC_CLASS = "TokenizersBackend"
# What these say is in tokenizer.json and tokenizer_config.json of a tokenizer that was written anew.
REPLACED = ("special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Companions:
    """What is written beside config and weights.

    Args:
        copies: files of the source, by their names.
        rewritten: contents of further files, which go before copies of the same names.
    """

    copies: Mapping[str, Path]
    rewritten: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, workspace: Workspace) -> None:
        """Into the folder of a checkpoint."""
        for name, source in self.copies.items():
            if name not in self.rewritten:
                workspace.copy(source, name)
        for name, content in self.rewritten.items():
            workspace.write_bytes(name, content)


def settle_companions(source: Path, config: str) -> Companions:
    """Decide what is carried from a model's folder to a checkpoint, and prove that its tokenizer stays what it is.

    Args:
        source: the folder.
        config: text of the checkpoint's config.json.

    Raises:
        InputError: a file leads out of the folder, the tokenizer cannot be read, or it would cut text otherwise.
    """
    copies, source_config = {name: inside(source, name) for name in companion_names(source)}, load_config(source)
    written: dict[str, bytes] = {}
    if usable_generation(source):
        copies[GENERATION_FILE] = inside(source, GENERATION_FILE)
    elif auto_name(source_config) in GENERATING:
        written[GENERATION_FILE] = default_generation(source_config).to_json_string().encode()
    companions = Companions(copies, written)
    if not tokenizer_names(source):
        return companions
    tokenizer = load_tokenizer(source)
    renamed = _with_old_class(copies)
    if renamed and not _difference(Companions(copies, {**written, **renamed}), config, tokenizer):
        return Companions(copies, {**written, **renamed})
    reason = _difference(companions, config, tokenizer)
    if not reason:
        return companions
    if not getattr(tokenizer, "is_fast", False):
        raise _unlike(source, config, reason)
    kept = {name: path for name, path in copies.items() if name not in REPLACED}
    companions = Companions(kept, {**written, **_rewritten(tokenizer)})
    if again := _difference(companions, config, tokenizer):
        raise _unlike(source, config, again)
    warn(
        f"the tokenizer is written anew as tokenizer.json: beside a config.json of {_model_type(config)}, transformers "
        f"would take another class for the files of {source}, and {reason}"
    )
    return companions


def _unlike(source: Path, config: str, reason: str) -> InputError:
    return InputError(
        f"beside a config.json of {_model_type(config)}, transformers reads the tokenizer of {source} otherwise: "
        f"{reason}",
        "another --target may keep it; a tokenizer.json of the model, saved with save_pretrained, usually does",
    )


def _model_type(config: str) -> str:
    return str(json.loads(config)["model_type"])


def _with_old_class(copies: Mapping[str, Path]) -> dict[str, bytes]:
    """The settings of a tokenizer under its class's old name, if they have the new one."""
    if CONFIG_FILE not in copies:
        return {}
    settings = read_mapping(copies[CONFIG_FILE], limit_bytes=LIMIT_BYTES)
    if settings.get("tokenizer_class") != NEW_GENERIC_CLASS:
        return {}
    return {CONFIG_FILE: _settings_bytes({**settings, "tokenizer_class": GENERIC_CLASS})}


def _settings_bytes(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def _rewritten(tokenizer: Any) -> dict[str, bytes]:
    """The tokenizer as it was loaded, for the class that takes it as it is written."""
    with _temporary() as folder:
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        # Code is never carried, so that no name of it may stay.
        settings = {name: value for name, value in settings.items() if name != "auto_map"}
        settings["tokenizer_class"] = GENERIC_CLASS
        (folder / CONFIG_FILE).write_bytes(_settings_bytes(settings))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _difference(companions: Companions, config: str, expected: Any) -> str:
    """How the tokenizer of a checkpoint with these files would differ, or ""."""
    with _temporary() as folder:
        for name, source in companions.copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
        for name, content in companions.rewritten.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(config)
        try:
            found = stock_tokenizer(folder)
        except Exception as error:
            # Its readers raise whatever they stumble over.
            return f"it cannot be read there ({first_line(error)})"
        return token_difference(found, expected)


@contextmanager
def _temporary() -> Iterator[Path]:
    with disk_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="moeify-") as folder:
        yield Path(folder)
