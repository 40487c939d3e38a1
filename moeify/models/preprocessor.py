"""How a model's folder says that images or sound become its inputs: preprocessor_config.json, read by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeify.errors import InputError, first_line
from moeify.models.files import inside
from moeify.models.json_files import read_mapping
from moeify.models.stock import quiet

PROCESSOR_FILE = "preprocessor_config.json"
LIMIT_BYTES = 1 << 24


class Preprocessor:
    """Stock transformers' own, whose every stumble is an error with a hint.

    Args:
        path: the model's folder.
        kind: of what becomes inputs: `images`, `sound`.
        maker: what writes the file, for a hint.
        make: opens the one of transformers.

    Raises:
        InputError: the folder does not say how, or not in a way that stock transformers reads.
    """

    def __init__(self, path: Path, kind: str, maker: str, make: Callable[[], Any]) -> None:
        if not (path / PROCESSOR_FILE).exists():
            raise InputError(
                f"no {PROCESSOR_FILE} in {path}, which says how the model's inputs are made of {kind}",
                f"fetch it with the model, or write it with save_pretrained of the model's {maker}",
            )
        read_mapping(inside(path, PROCESSOR_FILE), limit_bytes=LIMIT_BYTES)
        self._path, self._kind = path, kind
        self.stock = self._tried(make)

    def __call__(self, raw: Any, **named: Any) -> Any:
        """What transformers makes of it, as tensors.

        Raises:
            InputError: it makes nothing, or things that differ in size.
        """
        return self._tried(lambda: self.stock(raw, return_tensors="pt", **named))

    def _tried(self, make: Callable[[], Any]) -> Any:
        try:
            with quiet():
                return make()
        except Exception as error:
            # Readers and processors raise whatever they stumble over.
            raise InputError(
                f"transformers cannot prepare {self._kind} as {self._path / PROCESSOR_FILE} says: {first_line(error)}",
                "fetch the file again; inputs of one model have one size",
            ) from error
