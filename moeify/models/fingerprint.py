"""What a model's files are told from others by, and whether they are still the same."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moeify.errors import InputError
from moeify.models.companions import companion_names

# As safetensors itself allows.
MAX_HEADER_BYTES = 100_000_000
# Of each tensor: weights of another training differ from the first number on.
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Fingerprint:
    """A model's files at one moment: enough to notice that one was changed or replaced, without reading all of them.

    Of config.json the content counts; of a shard its name, size, modification time, header and the first bytes of each
    tensor, so that a file of the same size and time is noticed, too. Inodes and times of the file system do not count:
    a copy that keeps modification times is the same model, and goes on with what was begun with the first.

    Args:
        path: the folder.
        weights: digest of config.json and of each shard, by name.
        companions: digest of each file that is carried along; no result of ours depends on them.
    """

    path: Path
    weights: Mapping[str, str]
    companions: Mapping[str, str]

    @classmethod
    def take(cls, path: Path, shards: Mapping[str, Path]) -> "Fingerprint":
        """Of the files as they are now.

        Args:
            path: the folder.
            shards: file of each tensor.
        """
        names = {"config.json", *(file.name for file in shards.values())}
        beside = {name for name in ("generation_config.json", *companion_names(path)) if (path / name).is_file()}
        return cls(
            path,
            {name: _file_digest(path / name) for name in sorted(names)},
            {name: _file_digest(path / name) for name in sorted(beside)},
        )

    @cached_property
    def value(self) -> str:
        """In hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.weights, sort_keys=True).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Compare the files with what they are now.

        Raises:
            InputError: one was changed, replaced or removed since.
        """
        for name, before in {**self.weights, **self.companions}.items():
            try:
                same = _file_digest(self.path / name) == before
            except OSError:
                same = False
            if not same:
                raise InputError(
                    f"{self.path / name} changed while the model was read",
                    "run the same command again when nothing writes there any more",
                )


def _file_digest(file: Path) -> str:
    """Of a safetensors file what `Fingerprint` says; of any other the content."""
    with file.open("rb") as opened:
        if file.suffix != ".safetensors":
            return hashlib.file_digest(opened, "sha256").hexdigest()
        stat = os.fstat(opened.fileno())
        digest = hashlib.sha256(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, MAX_HEADER_BYTES))
        digest.update(header)
        try:
            offsets = sorted(tensor["data_offsets"][0] for tensor in json.loads(header).values() if "dtype" in tensor)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            # Half-written: another digest than that of the whole file is all that is needed.
            offsets = []
        for offset in offsets:
            opened.seek(8 + length + offset)
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()
