"""Errors of disk and memory, as each library words them, are moeify's own; all others stay what they are."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from moeify import resources
from moeify.cache import check_place, disk_errors
from moeify.cli.app import run_command
from moeify.errors import DiskError, InputError, UsageError
from moeify.resources import check_address_space, check_room, resource_error


def quoted(number: int) -> SafetensorError:
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


TORCH_WRITER = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1455424 vs 1455316")
NUMBERS = {
    errno.ENOSPC: r"the disk of .* is full",
    errno.EDQUOT: r"the quota of the disk of .* is used up",
    errno.EFBIG: "reached the largest size that is allowed",
    errno.EROFS: "cannot write .*: Read-only file system",
    errno.EACCES: "cannot write .*: Permission denied",
    errno.EIO: "cannot write .*: Input/output error",
    errno.EMFILE: "cannot write .*: Too many open files",
    errno.ENAMETOOLONG: "cannot write .*: File name too long",
}


@pytest.mark.parametrize(("number", "message"), NUMBERS.items(), ids=map(errno.errorcode.get, NUMBERS))
def test_the_systems_number_says_what_it_is(tmp_path: Path, number: int, message: str) -> None:
    for error in (OSError(number, os.strerror(number)), quoted(number)):
        with pytest.raises(DiskError, match=message) as caught, disk_errors(tmp_path):
            raise error
        assert str(tmp_path) in str(caught.value)
        assert caught.value.hint


MEMORY = {
    "python": (MemoryError(), "memory is used up"),
    "torch": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        r"memory is used up where 4\.00 GB more were needed",
    ),
    "cuda": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB"),
        r"the GPU's memory is used up where 2\.15 GB more were needed",
    ),
    "safetensors": (quoted(errno.ENOMEM), "memory is used up"),
    "mapping": (RuntimeError("unable to mmap 4465096 bytes from file <x>: Cannot allocate memory (12)"), "4.47 MB"),
    "c++": (RuntimeError("std::bad_alloc"), "memory is used up"),
    "threads": (RuntimeError("can't start new thread"), "memory is used up"),
}


@pytest.mark.parametrize(("error", "message"), MEMORY.values(), ids=MEMORY)
def test_memory_that_is_used_up(error: Exception, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught, disk_errors(Path("somewhere")):
        raise error
    assert type(caught.value) is InputError
    assert "--tokens" in caught.value.hint


def test_what_numpy_cannot_allocate_is_said_in_bytes() -> None:
    with pytest.raises(InputError, match=r"memory is used up where 9,010 TB more were needed"), disk_errors(Path()):
        np.ones(1 << 50)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("os error"),
        OSError("no number"),
        ConnectionResetError(104, "reset"),
        RuntimeError("shape"),
        KeyError(),
    ],
    ids=repr,
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert resource_error(error) is None
    with pytest.raises(type(error)), disk_errors(Path()):
        raise error


def test_errors_of_moeify_stay_what_they_are() -> None:
    with pytest.raises(UsageError, match="Cannot allocate memory"), disk_errors(Path()):
        raise UsageError("Cannot allocate memory", "none")


def test_a_file_that_was_read_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=f"cannot use {tmp_path / 'gone'}: No such file"), disk_errors(tmp_path / "out"):
        (tmp_path / "gone").read_text()


def test_what_torch_saves_ends_at_a_limit(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(DiskError), disk_errors(tmp_path):
            torch.save(torch.zeros(100_000), tmp_path / "optimizer.pt")
        with pytest.raises(DiskError, match=r"ends at 50\.0 kB here \(ulimit -f\)"), disk_errors(tmp_path):
            (tmp_path / "text").write_bytes(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(resource_error(TORCH_WRITER, tmp_path), DiskError)


def test_room_that_is_not_there(tmp_path: Path) -> None:
    check_room(tmp_path / "deep" / "out", 1)
    with pytest.raises(DiskError, match=r"1,150,000 TB are needed") as caught:
        check_room(tmp_path / "deep" / "out", 1 << 60)
    assert "same command again" in caught.value.hint


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    check_place(tmp_path / "deep" / "down" / "result.json")
    with pytest.raises(DiskError, match="File exists"):
        check_place(tmp_path / "file" / "result.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_line_knows_errors_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moeify import plugin_list

    def broken(_: str) -> None:
        raise MEMORY["torch"][0]

    monkeypatch.setattr(plugin_list, "listing", broken)
    assert run_command(["ls", "targets"]) == 3
    assert "error: memory is used up where 4.00 GB more were needed" in capsys.readouterr().err


def test_too_little_address_space_is_refused_at_once() -> None:
    """Under such a limit the libraries abort, or never return."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (800_000_000,) * 2)\n"
        "from moeify.cli.app import run_command\n"
        "sys.exit(run_command(['split', 'builtin', '-o', 'nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "error: address space is limited to 800 MB, loading torch and transformers takes 2.20 GB" in done.stderr


def test_address_space_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    check_address_space()
    monkeypatch.setattr(resources.resource, "getrlimit", lambda _: (1 << 40, 1 << 40))
    check_address_space()
