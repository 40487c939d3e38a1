"""Disks and memory that give no more: errors of the system, which every library words in its own way, as moeify's.

A full disk, a quota, a limit of file sizes, a read-only or broken one are a `DiskError`; memory that is used up is an
`InputError`. Whatever is finished stays.
"""

import errno
import os
import re
import resource
import shutil
from pathlib import Path

from moeify.errors import DiskError, InputError, MoeifyError
from moeify.words import size

# safetensors and tokenizers quote the system's number in a message of their own.
QUOTED = re.compile(r"\(os error (\d+)\)")
# torch.save, whose messages say where in its source a write came out short.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container")
MEMORY_WORDS = (
    "can't allocate memory",
    "Cannot allocate memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
)
# torch: "you tried to allocate 123 bytes"; CUDA: "Tried to allocate 2.00 GiB"; numpy: "Unable to allocate 1.5 GiB".
ALLOCATION = re.compile(r"(?:allocate|mmap) ([\d.]+) (bytes|[KMGTPE]iB)")
UNITS = {"bytes": 1, **{f"{letter}iB": 1 << 10 * power for power, letter in enumerate("KMGTPE", start=1)}}
# Address space that the libraries take before any work; with less they abort or never return. Measured: a split of the
# embedded model passes with 2.0 GB and not with 1.7 GB (torch 2.13 for CPUs, transformers 5.23, 2026-11-25).
LIBRARIES_BYTES = 2_200_000_000
# Where Linux says what a container may use and uses, of both versions of control groups.
CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
NETWORK_ERRORS = (ConnectionError, TimeoutError, InterruptedError, ChildProcessError)


def resource_error(
    error: BaseException, folder: Path | None = None, hint: str = "", *, name: str = ""
) -> MoeifyError | None:
    """An error of disk or memory as moeify's own; None for any other.

    Args:
        error: whatever was raised.
        folder: what was being written; None takes the file that the error names.
        hint: what to do about a place that cannot be written.
        name: of such a place; its path if there is none.
    """
    if isinstance(error, MoeifyError):
        return None
    number = _system_number(error)
    if number == errno.ENOMEM or isinstance(error, MemoryError) or _speaks_of_memory(error):
        return _memory_error(error)
    if number is None:
        return None
    named = getattr(error, "filename", None)
    if folder is None or (named is not None and not _related(Path(str(named)).absolute(), folder.absolute())):
        # A file that was read while the folder was written.
        place, verb, hint = (None if named is None else Path(str(named))), "use", "see to this file or its disk"
    else:
        place, verb = folder, f"write {name}".rstrip()
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _no_room(number, place or folder)
    return DiskError(f"cannot {verb} {place or 'a file'}: {os.strerror(number)}", hint)


def _related(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _system_number(error: BaseException) -> int | None:
    """The system's number of an error of files; None where the error is of another kind."""
    if isinstance(error, OSError):
        return None if isinstance(error, NETWORK_ERRORS) else error.errno
    quoted = QUOTED.search(str(error))
    if quoted:
        return int(quoted[1])
    return errno.ENOSPC if any(word in str(error) for word in TORCH_WRITER) else None


def _no_room(number: int, place: Path | None) -> DiskError:
    hint = "make room and run the same command again: it goes on from what is finished"
    free = ""
    if place is not None:
        free = f" ({shutil.disk_usage(_existing(place)).free / 1e6:,.0f} MB free)"
    where = place or "a file"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if number == errno.EFBIG:
        end = "" if limit == resource.RLIM_INFINITY else f", which ends at {size(limit)} here (ulimit -f)"
        return DiskError(f"a file in {where} reached the largest size that is allowed{end}", hint)
    if number == errno.EDQUOT:
        return DiskError(f"the quota of the disk of {where} is used up{free}", hint)
    return DiskError(f"the disk of {where} is full{free}", hint)


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether two paths, which need not exist, are on the same disk."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or the nearest folder around it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot end.

    Args:
        folder: where files are going to be written; it need not exist.
        num_bytes: that they take.

    Raises:
        DiskError: the disk has less left.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if free < num_bytes:
        raise DiskError(
            f"the disk of {folder} is too full: {size(num_bytes)} are needed ({free / 1e6:,.0f} MB free)",
            "make room and run the same command again: it goes on from what is finished",
        )


def available_memory() -> int:
    """Bytes that this process can still have without swapping: of the machine, or of its container."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for limit, used in CONTAINER_FILES:
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            # No container, or one without a limit, which is the word max.
            continue
    return max(0, available)


def _speaks_of_memory(error: BaseException) -> bool:
    return isinstance(error, (RuntimeError, ImportError)) and any(word in str(error) for word in MEMORY_WORDS)


def _memory_error(error: BaseException) -> InputError:
    allocation = ALLOCATION.search(str(error).replace("memory: you tried to allocate ", ""))
    needed = f" where {size(float(allocation[1]) * UNITS[allocation[2]])} more were needed" if allocation else ""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limited = "" if limit == resource.RLIM_INFINITY else f" (ulimit -v allows {size(limit)})"
    what = "the GPU's memory" if "CUDA" in str(error) else "memory"
    return InputError(
        f"{what} is used up{needed}{limited}",
        "free some, or take fewer --tokens or a shorter --context; what is finished stays",
    )


def check_address_space() -> None:
    """Refuse a limit of address space under which the libraries could not even be loaded.

    Raises:
        InputError: `ulimit -v` allows less than they take.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    if limit < LIBRARIES_BYTES:
        raise InputError(
            f"address space is limited to {size(limit)}, loading torch and transformers takes {size(LIBRARIES_BYTES)}",
            "raise or drop the limit (ulimit -v)",
        )
    import numpy as np
    from scipy.linalg import blas

    # OpenBLAS asks for its buffers at the first product, and asks forever if it does not get them.
    square = np.ones((256, 256))
    blas.dgemm(1.0, square @ square, square)
