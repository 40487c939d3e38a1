"""A folder is replaced only if moeify wrote all that is in it; what is wrong with OUT is said before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moeify.errors import DiskError, InputError, MoeifyError, UsageError
from moeify.export.record import LAST_FILE, RECORD_FILE, check_out, check_replaceable, record_text

FILES = ("model-00001-of-00001.safetensors", "config.json", "logs/*/events.out.tfevents.*")


def written(out: Path) -> Path:
    """A folder as moeify leaves it."""
    (out / "logs" / "0-full").mkdir(parents=True)
    (out / RECORD_FILE).write_text(record_text({"model": "abc"}, FILES, {"parameters": 1}))
    for name in (*FILES[:2], LAST_FILE, "logs/0-full/events.out.tfevents.1700000000.host.12.0"):
        (out / name).write_text("ours")
    return out


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_ours_is_replaceable_when_asked(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    check_replaceable(out, overwrite=True)
    with pytest.raises(InputError, match=r"out exists") as caught:
        check_replaceable(out, overwrite=False)
    assert "--overwrite" in caught.value.hint


def into(out: Path, name: str, text: str = "years of work") -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text)


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda out: into(out, "notes.txt"), "out/notes.txt"),
    "a model": (lambda out: into(out, "dense/model.safetensors"), "out/dense"),
    "an empty folder": (lambda out: (out / "empty").mkdir(), "out/empty"),
    "beside the logs": (lambda out: into(out, "logs/0-full/notes.txt"), "out/logs/0-full/notes.txt"),
    "below an event file's name": (
        lambda out: into(out, "logs/0-full/events.out.tfevents.1/notes.txt"),
        "out/logs/0-full/events.out.tfevents.1",
    ),
    "a hidden file": (lambda out: into(out, ".git"), "out/.git"),
    "a folder under a known name": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").mkdir()),
        "out/config.json",
    ),
    "a link under a known name": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").symlink_to("/etc/hostname")),
        "out/config.json",
    ),
}


@pytest.mark.parametrize(("change", "name"), STRANGERS.values(), ids=STRANGERS)
def test_the_first_stranger_is_named(tmp_path: Path, change: Callable[[Path], object], name: str) -> None:
    out = written(tmp_path / "out")
    change(out)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path / name} was not written by moeify"):
        check_out(out, [], overwrite=True)
    assert tree(tmp_path) == before


RECORDS = {
    "no record": None,
    "an empty object": "{}",
    "a list": "[]",
    "half a record": '{"schema": "moeify.record/1", "files": [',
    "another schema": '{"schema": "moeify.split/1", "files": ["thesis.txt"]}',
    "files that are no list": '{"schema": "moeify.record/1", "files": "thesis.txt"}',
    "no text": "\0",
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_folder_without_a_record_is_a_strangers(tmp_path: Path, record: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("thesis.txt", "split_plan.safetensors"):
        (out / name).touch()
    if record is not None:
        (out / RECORD_FILE).write_text(record)
    with pytest.raises(InputError, match="out was not written by moeify"):
        check_replaceable(out, overwrite=True)


def test_a_record_without_files_is_of_an_earlier_version(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    (out / RECORD_FILE).write_text(json.dumps({"schema": "moeify.record/1", "job": {}}))
    with pytest.raises(InputError, match="does not name the folder's files") as caught:
        check_replaceable(out, overwrite=True)
    assert "remove it yourself" in caught.value.hint


PLACES: dict[str, tuple[str, type[MoeifyError], str]] = {
    "the working folder": (".", UsageError, "the folder that you are in"),
    "its parent": ("..", UsageError, "or one around it"),
    "the root": ("/", UsageError, "or one around it"),
    "by a detour": ("../here", UsageError, "the folder that you are in"),
    "through no folder": ("nope/../b", UsageError, "leads through nope, which is not a folder"),
    "a model": ("model", UsageError, "one of the models themselves"),
    "a link to a model": ("link", UsageError, "one of the models themselves"),
    "a circle of links": ("circle", UsageError, "is not a path"),
    "a name of no letters": ("a\0b", UsageError, "is not a path"),
    "a mounted disk": ("/proc", UsageError, "where a disk is mounted"),
    "below a file": ("file/out", DiskError, "cannot write"),
    "a file": ("file", InputError, "not written by moeify"),
    "too long a name": ("a" * 300, DiskError, "File name too long"),
    "no disk for files": ("/proc/out", DiskError, "cannot write"),
}


@pytest.mark.parametrize(("out", "kind", "message"), PLACES.values(), ids=PLACES)
def test_a_bad_place_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, kind: type[MoeifyError], message: str
) -> None:
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    (here / "file").write_text("years of work")
    (here / "link").symlink_to("model")
    (here / "circle").symlink_to("circle")
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MoeifyError, match=message) as caught:
        check_out(Path(out), ["model", "builtin"], overwrite=True)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["new", "deep/down/new", "./deep/../new", "empty", "link", "dangling"])
def test_a_good_place_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    for name in ("empty", "deep", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("elsewhere/new")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert check_out(Path(out), [], overwrite=False) == (tmp_path / out).resolve()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_copy_of_a_result_is_ours_too(tmp_path: Path) -> None:
    copied = shutil.copytree(written(tmp_path / "out"), tmp_path / "copy")
    check_replaceable(Path(copied), overwrite=True)
