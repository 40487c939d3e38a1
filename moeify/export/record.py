"""What a checkpoint folder says of itself, and the folders that may be replaced: those that hold nothing else.

moeify.json is the record of every folder that moeify writes: the job it is the result of, and the names of all its
files. A folder with a file that its record does not name is never replaced.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moeify.cache import check_place, disk_errors, intact
from moeify.errors import InputError, UsageError

RECORD_FILE = "moeify.json"
# Written last: a folder that has it has everything.
LAST_FILE = "README.md"
# TensorBoard puts time, host and process into a name; the record has a pattern, so that the same run writes the same.
PATTERNS = ("logs/*/events.out.tfevents.*",)
SCHEMA = "moeify.record/1"


def record_text(job: Mapping[str, Any], files: Collection[str], numbers: Mapping[str, Any]) -> str:
    """The record of a folder.

    Args:
        job: what it is the result of.
        files: relative names of its files but for record and LAST_FILE, and patterns.
        numbers: of parameters.
    """
    record = {"schema": SCHEMA, "job": job, "files": sorted({*files, RECORD_FILE, LAST_FILE}), **numbers}
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


def check_out(out: Path, models: Collection[object], *, overwrite: bool) -> Path:
    """The folder that OUT stands for; everything that can be wrong with it is found here, before any work.

    Args:
        out: as the user named it.
        models: that are read, as they were named; those that are no folder do not matter.
        overwrite: an earlier result may be replaced.

    Raises:
        UsageError: no folder can appear there, or it is one of the models.
        InputError: it may not be replaced, or nothing can be written there.
    """
    place = _place_of(out)
    check_is_no_model(place, *(Path(model) for model in models if isinstance(model, (str, Path))))
    check_replaceable(place, overwrite=overwrite)
    return place


def check_is_no_model(place: Path, *folders: Path) -> None:
    """Raise UsageError for an OUT that is read from."""
    with disk_errors(place):
        if any(place == folder.resolve() for folder in folders):
            raise UsageError(f"{place} is one of the models themselves", "choose another -o")


def _place_of(out: Path) -> Path:
    """The folder that OUT stands for, links followed; tries that it can be written, and leaves nothing.

    Raises:
        UsageError: no folder can appear there, or the process works inside of it.
        DiskError: nothing can be written there.
    """
    parts = out.parts
    parent = Path(*parts[: len(parts) - parts[::-1].index("..")]) if ".." in parts else Path()
    try:
        place, here, is_folder = out.resolve(), Path.cwd().resolve(), parent.is_dir()
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"{out} is not a path: {error}", "choose another -o") from error
    if not is_folder:
        raise UsageError(f"{out} leads through {parent.parent}, which is not a folder", "choose another -o")
    if here.is_relative_to(place):
        raise UsageError(
            f"{out} is the folder that you are in, or one around it, and a result takes the whole place of its folder",
            "-o ./moe puts it below",
        )
    with disk_errors(place):
        if place.is_mount():
            raise UsageError(f"{out} is where a disk is mounted, and no folder can take its place", f"-o {out / 'moe'}")
    check_place(place.with_name(f"{place.name}.partial"))
    return place


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that exists, and never replace a folder with a file that moeify did not write.

    Raises:
        InputError: OUT exists and may not be replaced.
    """
    with disk_errors(out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if not overwrite:
            raise InputError(f"{out} exists", "--overwrite replaces it once the new one is complete")
        record = intact(out / RECORD_FILE, read_record) if out.is_dir() else None
        if record is None:
            raise InputError(f"{out} was not written by moeify, so it is not replaced", "choose another -o")
        if not record.get("files"):
            raise InputError(
                f"{out / RECORD_FILE} does not name the folder's files, so the folder is not replaced",
                "an earlier moeify wrote it: remove it yourself, or choose another -o",
            )
        stranger = next(strangers(out, record["files"]), None)
    if stranger is not None:
        raise InputError(
            f"{out / stranger} was not written by moeify, so {out} is not replaced",
            "move it away, or choose another -o",
        )


def read_record(file: Path) -> dict[str, Any]:
    """The values in a record.

    Raises:
        ValueError: it is none.
    """
    record = json.loads(file.read_text())
    files = record.get("files", []) if isinstance(record, dict) else None
    if not isinstance(files, list) or not str(record.get("schema")).startswith("moeify.record/"):
        raise ValueError(f"{file} is not a record")
    return dict(record)


def strangers(folder: Path, files: Collection[str]) -> Iterator[str]:
    """Relative names of what is in a folder and not among its files: files, links and folders; first ones first."""
    names, folders = set(files), {str(parent) for name in files for parent in Path(name).parents}
    patterns = names.intersection(PATTERNS)
    above = {pattern.rpartition("/")[0] for pattern in patterns}

    def refuse(error: OSError) -> None:
        raise error

    for path, below, here in os.walk(folder, onerror=refuse):
        at = Path(path)
        below.sort()
        for name in sorted([*below, *here]):
            relative = str((at / name).relative_to(folder))
            known, further = (folders, above) if name in below else (names, patterns)
            if (at / name).is_symlink() or not (relative in known or _matches(relative, further)):
                yield relative


def _matches(name: str, patterns: Collection[str]) -> bool:
    """A star stands for a part of one name, never for a slash."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)
