"""A model benchmark as a JSON file, written whole or not at all, and read back."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.models.results import (
    SCHEMA,
    Change,
    Interval,
    LayerExperts,
    Model,
    ModelBench,
    Part,
    Quality,
    Regressions,
    Speed,
    Verdict,
)
from moeify.errors import InputError

FILE = "bench.json"
HINT = "name a file that moeify bench -o FOLDER wrote: FOLDER/bench.json"


def check(folder: Path, *, overwrite: bool) -> None:
    """Make the folder.

    Raises:
        InputError: there is a result that must not be replaced, or the folder cannot be made.
    """
    if (folder / FILE).exists() and not overwrite:
        raise InputError(f"{folder / FILE} exists", "--overwrite replaces it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}", "choose another --out") from error


def save(result: ModelBench, folder: Path) -> None:
    """Write FOLDER/bench.json into a folder that is there. What is not finite becomes null, which JSON has a word for.

    Raises:
        InputError: the folder cannot be written.
    """
    path = folder / FILE
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            json.dump({"schema": SCHEMA, **_finite(dataclasses.asdict(result))}, file, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", "choose another --out") from error


def load(path: Path) -> ModelBench:
    """Read a result, or the one in a folder.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    file = path / FILE if path.is_dir() else path
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}", HINT) from error
    found = values.pop("schema", None) if isinstance(values, dict) else None
    if found != SCHEMA:
        raise InputError(f"{file} has schema {found}, not {SCHEMA}", HINT)
    try:
        return _result(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no complete result: {error}", HINT) from error


def _result(values: dict[str, Any]) -> ModelBench:
    rows: dict[str, Any] = {
        "models": [
            Model(**{**row, "parts": {part: Part(**sizes) for part, sizes in row["parts"].items()}})
            for row in values["models"]
        ],
        "quality": [_quality(row) for row in values["quality"]],
        "speed": [Speed(**row) for row in values["speed"]],
        "verdicts": [Verdict(**row) for row in values["verdicts"]],
        "experts": {
            name: [LayerExperts(**{key: _tuples(value) for key, value in row.items()}) for row in layers]
            for name, layers in values["experts"].items()
        },
        "ceilings": Ceilings(**values["ceilings"]) if values["ceilings"] else None,
        "regressions": None,
    }
    kept = values.get("regressions")
    if kept:
        changes = tuple(Change(**change) for change in kept["changes"])
        rows["regressions"] = Regressions(**{**kept, "changes": changes, "missing": tuple(kept["missing"])})
    return ModelBench(**{**values, **rows})


def _quality(row: dict[str, Any]) -> Quality:
    over_static = {name: Interval(**ratio) for name, ratio in row.get("over_static", {}).items()}
    return Quality(**{**row, "over_static": over_static})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
