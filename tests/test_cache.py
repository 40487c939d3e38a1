"""Finished work is whole or not there, whoever is killed and whoever is faster, and known by all of its inputs."""

import errno
import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from moeify import cache
from moeify.cache import cache_dir, digest, intact, made_once, once, replacing
from moeify.errors import InputError


def test_environment_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MOEIFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "moeify"
    # Its specification has relative paths ignored.
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert cache_dir() == Path.home() / ".cache" / "moeify"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "moeify"


def test_the_folder_appears_with_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with made_once(folder) as partial:
        (partial / "weights").write_text("all")
        assert not folder.exists()
    assert (folder / "weights").read_text() == "all"
    assert list(folder.parent.iterdir()) == [folder]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), made_once(tmp_path / "model") as partial:
        (partial / f"weights{1 / 0}").write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_only_a_folder_that_is_never_taken_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process runs no `finally`: what is left then must have another name than the model."""
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt), made_once(tmp_path / "model") as partial:
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [partial]
    assert ".partial-" in partial.name
    with made_once(tmp_path / "model") as again:
        assert again != partial


def test_the_slower_of_two_discards_its_copy(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with made_once(folder) as slow:
        (slow / "weights").write_text("slow")
        with made_once(folder) as fast:
            (fast / "weights").write_text("fast")
    assert (folder / "weights").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the cache") as caught, made_once(tmp_path / "file" / "model"):
        pass
    assert "MOEIFY_CACHE" in caught.value.hint


@dataclass(frozen=True)
class Inputs:
    number: int
    names: tuple[str, ...] = ()


def test_equal_inputs_have_one_digest(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("content")
    parts = lambda: ({"b": 1, "a": [2.5, None]}, Inputs(3, ("x",)), np.arange(6), tmp_path / "text")  # noqa: E731
    assert digest(*parts()) == digest(*parts())
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len(digest()) == 64


def test_whatever_differs_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one").write_text("content")
    (tmp_path / "two").write_text("Content")
    integers = np.arange(6)
    parts: list[tuple[Any, ...]] = [
        (),
        ("ab", "c"),
        ("a", "bc"),
        (["ab", "c"],),
        (1,),
        (1.5,),
        ("1",),
        (Inputs(1),),
        (Inputs(2),),
        (Inputs(1, ("x",)),),
        (integers,),
        (integers.astype(np.int32),),
        (integers.reshape(2, 3),),
        (tmp_path / "deep" / "one",),
        (tmp_path / "two",),
        (tmp_path,),
    ]
    assert len({digest(*part) for part in parts}) == len(parts)
    before = digest(tmp_path)
    (tmp_path / "deep" / "one").write_text("c0ntent")
    assert digest(tmp_path) != before


def test_what_has_no_digest_is_refused() -> None:
    with pytest.raises(TypeError):
        digest(object())


def test_the_code_is_part_of_every_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest("input")
    monkeypatch.setattr(cache, "_software", lambda: "another version")
    assert digest("input") != before


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with replacing(file) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    with replacing(file) as slow:
        slow.write_text("slow")
        with replacing(file) as fast:
            fast.write_text("fast")
        assert file.read_text() == "fast"
    assert file.read_text() == "slow"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("damage", [b"", b"half a file", None], ids=["empty", "other", "short"])
def test_a_damaged_file_is_none(tmp_path: Path, damage: bytes | None) -> None:
    def numbers(file: Path) -> Any:
        with safe_open(file, framework="np") as reader:
            return reader.get_tensor("numbers").tolist()

    def values(file: Path) -> Any:
        return json.loads(file.read_text())

    save_file({"numbers": np.arange(100)}, tmp_path / "tensors")
    (tmp_path / "json").write_text(json.dumps(list(range(100))))
    for name, read in (("tensors", numbers), ("json", values)):
        file = tmp_path / name
        assert intact(file, read) == list(range(100))
        file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
        assert intact(file, read) is None
        assert intact(tmp_path / "no such file", read) is None


def test_another_error_of_reading_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        intact(tmp_path, Path.read_text)


def test_a_value_is_made_once(tmp_path: Path) -> None:
    file, made = tmp_path / "deep" / "value.json", []

    def make() -> Any:
        made.append(len(made))
        return {"losses": (0.1, 1 / 3), "count": len(made)}

    first = once(file, make)
    assert first == once(file, make) == {"losses": [0.1, 1 / 3], "count": 1}
    file.write_text(file.read_text()[:-1])
    assert once(file, make)["count"] == once(file, make)["count"] == 2
    with pytest.raises(ZeroDivisionError):
        once(tmp_path / "other.json", lambda: 1 / 0)
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("code", "message", "hint"),
    [
        (errno.ENOSPC, "is full", "same command again"),
        (errno.EROFS, "cannot write to the cache", "MOEIFY_CACHE"),
    ],
)
def test_a_disk_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str, hint: str
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(code, "refused")

    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "sync", refuse)
    with pytest.raises(InputError, match=message) as caught:
        once(tmp_path / "compare" / "value.json", lambda: 1)
    assert hint in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_goes_when_nobody_else_writes(tmp_path: Path) -> None:
    old = time.time() - 60
    file, unique = tmp_path / "value.json", "0123456789abcdef" * 2
    leftover, young, users = (tmp_path / name for name in (f"x.{unique}.tmp", f"y.{unique}.tmp", "thesis.tmp"))
    for path in (leftover, young, users):
        path.touch()
    for path in (leftover, users):
        os.utime(path, (old, old))
    with replacing(tmp_path / "other.json") as temporary:
        temporary.touch()
        os.utime(temporary, (old, old))
        with replacing(file) as inner:
            inner.touch()
        # The outer one is still at work.
        assert temporary.exists()
        assert leftover.exists() is False
    with replacing(file) as inner:
        inner.touch()
    assert {path.name for path in tmp_path.iterdir()} == {"value.json", "other.json", young.name, users.name}


def test_folders_that_killed_processes_left_half_made_go(tmp_path: Path) -> None:
    old = time.time() - 60
    dead = tmp_path / f"model.partial-{'ab' * 16}"
    (dead / "deep").mkdir(parents=True)
    other = tmp_path / f"another.partial-{'ab' * 16}"
    other.mkdir()
    os.utime(dead, (old, old))
    os.utime(other, (old, old))
    with made_once(tmp_path / "model") as partial:
        os.utime(partial, (old, old))
        assert not dead.exists()
        with made_once(tmp_path / "model") as second:
            # The first one lives.
            assert partial.exists()
            (second / "file").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model", other.name}


def test_a_folder_that_somebody_else_has_for_himself_is_not_waited_for(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with replacing(tmp_path / "file") as temporary:
            temporary.touch()
    finally:
        os.close(descriptor)
    assert (tmp_path / "file").exists()


def test_without_a_home_the_cache_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MOEIFY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(nowhere))
    with pytest.raises(InputError, match="no home folder") as caught:
        cache.cache_dir()
    assert "MOEIFY_CACHE" in caught.value.hint
