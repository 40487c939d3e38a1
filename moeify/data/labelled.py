"""Examples with labels, of any modality: a table of texts or paths, or a folder with one folder a class.

A SET is one of

    labels.csv        columns `text` or `path`, and `label`; paths are relative to the file
    set.npz           arrays `images` [N, H, W] and `labels` [N], and, if they are divided, texts `splits` [N]
    digits            scikit-learn's handwritten digits, every fifth for the test
    folder/           one folder a class; with `train` and `test` (or `val`) in it, these hold the folders of classes

A column `split` that says `train` or `test` (or `val`, `validation`), or such folders, divide it. Otherwise a seeded
fifth of it is the test. Same file, same seed: same examples, in the same order, for every model.

Legend: N examples.
"""

import csv
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.data.images import ARRAYS, labelled_arrays
from moeify.data.images import SUFFIXES as IMAGE_SUFFIXES
from moeify.errors import InputError
from moeify.families import Modality
from moeify.models.builtin_vit import digits
from moeify.words import listing, printable

TABLE = ".csv"
# What divides a set: its names, and whether it is the test.
SPLITS: Mapping[str, bool] = {"train": False, "training": False, "test": True, "val": True, "validation": True}
# Files by their endings, and what they hold; those of images and sound are added by what reads them.
SUFFIXES: Mapping[str, Modality] = {".txt": "text", **dict.fromkeys(IMAGE_SUFFIXES, "image")}
TEST_SHARE = 0.2
HINT = "a labelled set is a .csv with the columns text (or path) and label, or a folder with one folder a class"


@dataclass(frozen=True)
class Labelled:
    """Examples with labels.

    Args:
        name: as it was given.
        modality: of the examples.
        items: texts, paths of files, or arrays: what a reader of data/examples.py takes.
        labels_N: number of each one's class.
        classes: names, sorted; a label is a place in it.
        is_test_N: which ones are for the test.
        sha256: of texts or paths and labels.
    """

    name: str
    modality: Modality
    items: Sequence[Any]
    labels_N: Tensor
    classes: tuple[str, ...]
    is_test_N: Tensor
    sha256: str

    @property
    def test(self) -> list[int]:
        """Numbers of the examples for the test."""
        return self.is_test_N.nonzero().flatten().tolist()

    @property
    def train(self) -> list[int]:
        return (~self.is_test_N).nonzero().flatten().tolist()


# Sets that have a name: name -> opens it; added by what reads them.
NAMED: dict[str, Callable[[], Labelled]] = {
    "digits": lambda: make_labelled("digits", list(_digit_rows()), modality="image")
}


def is_labelled(name: str) -> bool:
    """Whether a name is that of a labelled set, be it there or not."""
    return name in NAMED or Path(name).suffix in (TABLE, *ARRAYS) or Path(name).is_dir()


def open_labelled(name: str, *, seed: int = 0) -> Labelled:
    """Read a set's texts or paths, and its labels.

    Args:
        name: a .csv file, a folder, or a name of NAMED.
        seed: of the division, where the set has none of its own.

    Raises:
        InputError: it cannot be read, or has not two classes with examples to learn from and to test.
    """
    if name in NAMED:
        return NAMED[name]()
    path = Path(name).expanduser()
    if path.suffix in ARRAYS:
        return make_labelled(name, list(_array_rows(path)), modality="image", seed=seed)
    rows = list(_table_rows(path) if path.suffix == TABLE and not path.is_dir() else _folder_rows(path))
    return make_labelled(name, rows, seed=seed)


def make_labelled(
    name: str, rows: Sequence[tuple[Any, str, str]], *, modality: Modality | None = None, seed: int = 0
) -> Labelled:
    """A set of (example, label, split) rows; an empty split leaves the division to the seed.

    Args:
        name: of the set.
        rows: examples are texts, paths or arrays.
        modality: that of the files if there is none.
        seed: of the division.

    Raises:
        InputError: labels or divisions are missing.
    """
    classes = tuple(sorted({label for _, label, _ in rows}))
    if len(classes) < 2:
        raise InputError(f"{name} has {len(classes)} classes in {len(rows):,} examples, 2 or more are needed", HINT)
    splits = {split for _, _, split in rows}
    if strange := sorted(splits - {*SPLITS, ""}):
        raise InputError(f"{name} has a split {printable(strange[0])!r}", f"expected one of {', '.join(SPLITS)}")
    if "" in splits and splits != {""}:
        raise InputError(f"{name} says of some examples whether they are for the test, of others not", HINT)
    items = [item for item, _, _ in rows]
    digest = hashlib.sha256()
    for item, label, split in rows:
        known = str(item).encode(errors="surrogateescape") if isinstance(item, str | Path) else item.tobytes()
        digest.update(b"\0".join((known, label.encode(), split.encode())) + b"\1")
    if splits == {""}:
        order_N = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        is_test_N = torch.zeros(len(rows), dtype=torch.bool)
        is_test_N[order_N[: max(1, round(len(rows) * TEST_SHARE))]] = True
    else:
        is_test_N = torch.tensor([SPLITS[split] for _, _, split in rows])
    if is_test_N.all() or not is_test_N.any():
        empty = "to learn from" if is_test_N.all() else "for the test"
        raise InputError(f"{name} has no examples {empty}", HINT)
    labels_N = torch.tensor([classes.index(label) for _, label, _ in rows])
    modality = modality or _modality(name, items)
    return Labelled(name, modality, items, labels_N, classes, is_test_N, digest.hexdigest())


def _modality(name: str, items: Sequence[Any]) -> Modality:
    kinds = {SUFFIXES.get(item.suffix.lower()) if isinstance(item, Path) else "text" for item in items}
    if len(kinds) != 1 or (kind := kinds.pop()) is None:
        suffixes = sorted({item.suffix for item in items if isinstance(item, Path)})
        raise InputError(
            f"{name} holds files of other kinds: {printable(listing(suffixes))}", f"expected {', '.join(SUFFIXES)}"
        )
    return kind


def _table_rows(path: Path) -> Iterator[tuple[Any, str, str]]:
    """(text or path, label, split) of each line of a .csv."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [name for name in ("text", "path") if name in (reader.fieldnames or ())][:1]
            if not columns or "label" not in (reader.fieldnames or ()):
                found = printable(", ".join(reader.fieldnames or ())) or "none"
                raise InputError(f"{path} has the columns {found:.200}, expected text or path, and label", HINT)
            for number, row in enumerate(reader, start=2):
                value, label = row[columns[0]], row["label"]
                if not value or not label:
                    missing = columns[0] if not value else "label"
                    raise InputError(f"{path}, line {number}: there is no {missing}", HINT)
                item = value if columns == ["text"] else path.parent / value
                if isinstance(item, Path) and not item.is_file():
                    raise InputError(f"{path}, line {number}: there is no file {printable(item)}", HINT)
                yield item, label.strip(), (row.get("split") or "").strip()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", HINT) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no UTF-8 table: {error}", HINT) from error


def _array_rows(path: Path) -> Iterator[tuple[Any, str, str]]:
    """(image, label, split) of a file of numpy."""
    images, labels, splits = labelled_arrays(path)
    for place, label in enumerate(labels):
        yield images[place], str(label), "" if splits is None else str(splits[place])


def _digit_rows() -> Iterator[tuple[Any, str, str]]:
    """(image, label, split) of scikit-learn's digits."""
    for split, heldout in (("train", False), ("test", True)):
        for image, label in zip(*digits(heldout=heldout), strict=True):
            yield image, str(label), split


def _folder_rows(path: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, class, split) of every file in the folders of classes."""
    if not path.is_dir():
        raise InputError(f"there is no labelled set {path}", HINT)
    folders = _folders(path)
    divided = len(folders) > 1 and {folder.name for folder in folders} <= set(SPLITS)
    for part in folders if divided else [path]:
        for folder in _folders(part):
            for file in sorted(folder.rglob("*")):
                if file.is_file() and not any(name.startswith(".") for name in file.relative_to(path).parts):
                    yield file, folder.name, part.name if divided else ""


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
