"""Work that is done once and kept: whole or not at all, under the hash of everything that it depends on.

The primitives of all that goes on where a killed run stopped: `digest` names a piece of work, `replacing` writes its
file, `intact` reads the file again, `once` does all three for a JSON value, `made_once` for a folder.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from moeify.errors import InputError
from moeify.resources import resource_error

T = TypeVar("T")

# How the names of files and folders end that are being made.
UNIQUE = "[0-9a-f]" * 32
# Seconds from the making of a file or folder to its lock, with room to spare.
GRACE_S = 5.0


def cache_dir() -> Path:
    """The user's folder for such work: $MOEIFY_CACHE, $XDG_CACHE_HOME/moeify or ~/.cache/moeify.

    Raises:
        InputError: none of them is there.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/ (a relative path there counts as none).
    """
    if named := os.environ.get("MOEIFY_CACHE"):
        return Path(named)
    if (shared := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return shared / "moeify"
    try:
        return Path.home() / ".cache" / "moeify"
    except RuntimeError as error:
        raise InputError(f"there is no home folder for the cache: {error}", "set MOEIFY_CACHE to a folder") from error


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

    Of two processes that write the same file at the same time, each writes its own copy, and one of them stays. What
    killed processes left in the folder goes when nobody else is writing there.

    Raises:
        DiskError: the disk is full or cannot be written.
    """
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(file.parent), made_folders(file.parent), _busy(file.parent, clear=True):
        try:
            yield temporary
            # safetensors makes private files; a folder's reader may read all of it.
            temporary.chmod(file.parent.stat().st_mode & 0o666)
            # After a power cut a rename may otherwise outlive the data that it names.
            sync(temporary)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(file)


@contextlib.contextmanager
def made_folders(folder: Path) -> Iterator[None]:
    """Have a folder; what had to be made for it goes again if the work fails and leaves it empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def check_place(file: Path) -> None:
    """Try that a file can be written; nothing is left of that.

    Raises:
        DiskError: it cannot.
    """
    folder = file.parent
    with contextlib.suppress(_TriedError), disk_errors(folder), made_folders(folder):
        with contextlib.suppress(FileNotFoundError):
            # Long names fail here.
            file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp").lstat()
        # It has no name, so that a kill leaves nothing.
        with tempfile.TemporaryFile(dir=folder) as opened:
            opened.write(b"moeify tries whether it can write here")
            opened.flush()
            os.fsync(opened.fileno())
        raise _TriedError


class _TriedError(Exception):
    """A trial went well."""


@contextlib.contextmanager
def _busy(folder: Path, *, clear: bool = False) -> Iterator[None]:
    """Tell other processes that files are being written in a folder, by a shared lock on it.

    Args:
        folder: exists.
        clear: first remove files that killed processes left there, unless others are writing.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if clear and _locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for leftover in folder.glob(f"*.{UNIQUE}.tmp"):
                if _is_old(leftover):
                    leftover.unlink(missing_ok=True)
        # Whoever has it for himself alone, such as a user's `flock`, is not waited for.
        _locked(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    """False if another process has it locked, or its file system knows no such locks."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError:
        return False
    return True


def intact(file: Path, read: Callable[[Path], T]) -> T | None:
    """The content of a file, or None where it is missing or damaged, so that it has to be made again."""
    from safetensors import SafetensorError

    try:
        return read(file)
    except (FileNotFoundError, NotADirectoryError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None


def once(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in a file; made and written if it is missing or damaged.

    Raises:
        DiskError: the disk is full or cannot be written.
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
        DiskError: the disk is full or cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        with disk_errors(folder.parent, cached=True):
            _clear_abandoned(folder)
            partial.mkdir(parents=True)
            with _busy(partial):
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


def _clear_abandoned(folder: Path) -> None:
    """Remove what killed processes left of this folder; whoever lives holds a lock on its own."""
    for partial in folder.parent.glob(f"{glob.escape(folder.name)}.partial-{UNIQUE}"):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _is_old(partial) and _locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(descriptor)


def _is_old(path: Path) -> bool:
    """Older than what another process has made and not locked yet."""
    try:
        return time.time() - path.stat().st_mtime > GRACE_S
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def disk_errors(folder: Path, *, cached: bool = False) -> Iterator[None]:
    """Turn a disk that takes nothing, and memory that is used up, into errors with a hint; what is finished stays.

    Args:
        folder: what is written.
        cached: it is in the cache, wherever that is.

    Raises:
        DiskError: the disk is full, read-only or broken, or a quota or a limit of file sizes is reached.
        InputError: memory is used up.
    """
    try:
        yield
    except Exception as error:
        in_cache = cached or folder.is_relative_to(cache_dir())
        hint = "set MOEIFY_CACHE to a folder that can be written" if in_cache else "choose another -o"
        known = resource_error(error, folder, hint, name="to the cache" if in_cache else "")
        if known is None:
            raise
        raise known from error


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
