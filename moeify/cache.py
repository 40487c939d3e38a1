"""Things that are made once and kept: the embedded model and models converted from GGUF."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeify.errors import InputError


def cache_dir() -> Path:
    """Where they are kept: $MOEIFY_CACHE or ~/.cache/moeify."""
    return Path(os.environ.get("MOEIFY_CACHE") or Path.home() / ".cache" / "moeify")


@contextmanager
def made_once(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` at the end, so that what exists is complete.

    Of two processes that make the same thing at the same time, the one that finishes second discards its copy.

    Raises:
        InputError: the cache cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {folder.parent}: {error.strerror}",
            "set MOEIFY_CACHE to a folder that can be written",
        ) from error
    try:
        yield partial
        for path in partial.iterdir():
            # After a power cut a rename may otherwise outlive the data that it names.
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
