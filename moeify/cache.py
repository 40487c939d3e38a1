"""Work that is done once and kept: whole or not at all, under the hash of everything that it depends on.

The primitives of all that goes on where a killed run stopped: `digest` names a piece of work, `replacing` writes its
file, `intact` reads the file again, `once` does all three for a JSON value, `made_once` for a folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from moeify.errors import InputError

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)


def cache_dir() -> Path:
    """The user's folder for such work: $MOEIFY_CACHE or ~/.cache/moeify."""
    return Path(os.environ.get("MOEIFY_CACHE") or Path.home() / ".cache" / "moeify")


def digest(*parts: Any) -> str:
    """SHA-256 of everything that a result depends on, in hexadecimal digits; moeify's code is always part of it.

    Args:
        parts: paths stand for the contents of the file, or of all files below the folder; arrays for their type, shape
            and numbers; anything else is a JSON value or a dataclass of such.
    """
    hashed = hashlib.sha256(_software().encode())
    for part in parts:
        # Each part by its own hash: two parts never run into each other.
        hashed.update(hashlib.sha256(_content(part)).digest())
    return hashed.hexdigest()


def _content(part: Any) -> bytes:
    if isinstance(part, Path):
        files = sorted(path for path in part.rglob("*") if path.is_file()) if part.is_dir() else [part]
        return b"".join(_file_hash(file) for file in files if file.is_file())
    if hasattr(part, "tobytes"):
        return f"{part.dtype.str} {part.shape} ".encode() + bytes(part.tobytes())
    return json.dumps(part, sort_keys=True, default=asdict).encode()


def _file_hash(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


@cache
def _software() -> str:
    """Versions, and the hash of moeify's own files: an edit of the code is as good as another version."""
    sources = hashlib.sha256(b"".join(_file_hash(file) for file in sorted(Path(__file__).parent.rglob("*.py"))))
    return f"{version('torch')} {version('transformers')} {sources.hexdigest()}"


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file; what is written to it becomes the file at the end, whole or not at all.

    Of two processes that write the same file at the same time, each writes its own copy, and one of them stays.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(file.parent):
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            # safetensors makes private files; a folder's reader may read all of it.
            temporary.chmod(file.parent.stat().st_mode & 0o666)
            # After a power cut a rename may otherwise outlive the data that it names.
            sync(temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.rename(file)


def intact(file: Path, read: Callable[[Path], T]) -> T | None:
    """The content of a file, or None where it is missing or damaged, so that it has to be made again."""
    try:
        return read(file)
    except (FileNotFoundError, NotADirectoryError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def once(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in a file; made and written if it is missing or damaged.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    value = intact(file, lambda path: json.loads(path.read_text()))
    if value is None:
        value = json.loads(json.dumps(make()))
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(value))
    return value


@contextlib.contextmanager
def made_once(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` at the end, so that what exists is complete.

    Of two processes that make the same thing at the same time, the one that finishes second discards its copy.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        with disk_errors(folder.parent, cached=True):
            partial.mkdir(parents=True)
            yield partial
            for path in partial.iterdir():
                sync(path)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(folder: Path, *, cached: bool = False) -> Iterator[None]:
    """Turn a full or read-only disk into an error with a hint; whatever is finished stays, and the next run uses it."""
    try:
        yield
    except SafetensorError as error:
        if "No space left" not in str(error) and "os error 28" not in str(error):
            raise
        raise _disk_full(folder) from error
    except OSError as error:
        if error.errno in FULL:
            raise _disk_full(folder) from error
        if error.errno not in REFUSED:
            raise
        if cached or folder.is_relative_to(cache_dir()):
            hint = "set MOEIFY_CACHE to a folder that can be written"
            raise InputError(f"cannot write to the cache {folder}: {error.strerror}", hint) from error
        raise InputError(f"cannot write {folder}: {error.strerror}", "choose another -o") from error


def _disk_full(folder: Path) -> InputError:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return InputError(
        f"the disk of {folder} is full ({shutil.disk_usage(there).free / 1e6:,.0f} MB free)",
        "make room and run the same command again: it goes on from what is finished",
    )


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
