"""OUT/NAME.done: what a run made, so that it does nothing twice and replaces only what it made itself.

Written before a stage begins, without a result, and again when it is done. A run that was killed between its result
and the second marker finds a result that says of itself what the first marker claims.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeify.cache import intact, replacing
from moeify.errors import InputError
from moeify.recipes.names import MARKER

SCHEMA = "moeify.stage/1"


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        name: of the stage, and of the folder that it makes, if it makes one.
        result: the file that it writes last.
        folder: the folder that it replaces; None if it replaces the file alone.
        claim: values that the result holds if this stage made it.
    """

    name: str
    result: Path
    folder: Path | None
    claim: Mapping[str, Any]


@dataclass(frozen=True)
class Marker:
    """What a run has made, or is making, under a name.

    Args:
        inputs: digest of everything that the result depends on.
        result: SHA-256 of the file that the stage writes last; empty as long as it is not done.
        former: that of the file that was there when it began.
        claim: see Stage.
        seconds: that it took; None while it is not done, and if it was killed once and went on.
    """

    inputs: str
    result: str
    former: str
    claim: Mapping[str, Any]
    seconds: float | None = None


def marker_file(out: Path, name: str) -> Path:
    return out / f"{name}{MARKER}"


def read_marker(out: Path, name: str) -> Marker | None:
    """The marker; None without one.

    Raises:
        InputError: a file of that name is no marker, so it is not replaced.
    """
    file = marker_file(out, name)

    def read(path: Path) -> Marker:
        values = json.loads(path.read_text())
        if values.pop("schema") != SCHEMA:
            raise ValueError
        return Marker(**values)

    if not file.exists():
        return None
    marker = intact(file, read) if file.is_file() else None
    if marker is None:
        raise InputError(f"{file} is not a marker of this version of moeify", "move it away, or choose another -o")
    return marker


def begin(out: Path, stage: Stage, inputs: str) -> bool:
    """Say what is going to be made; True if it goes on with what was begun from the same inputs before."""
    former = read_marker(out, stage.name)
    _write(out, stage.name, Marker(inputs, "", _hash(stage.result), stage.claim))
    return former is not None and former.inputs == inputs and not former.result


def finish(out: Path, stage: Stage, inputs: str, seconds: float | None = None) -> None:
    """Say what has been made, and how long it took if that is known."""
    _write(out, stage.name, Marker(inputs, _hash(stage.result), "", stage.claim, seconds))


def is_done(out: Path, stage: Stage, inputs: str) -> bool:
    """The very result lies there, made from these inputs."""
    marker = read_marker(out, stage.name)
    return marker is not None and marker.inputs == inputs and _hash(stage.result) == marker.result != ""


def is_own(out: Path, stage: Stage) -> bool:
    """Whether this run folder made what lies there: another result may have been put into its place."""
    marker, found = read_marker(out, stage.name), _hash(stage.result)
    if marker is None or not found:
        return False
    if found in (marker.result, marker.former):
        return True
    # Begun, and killed after the result was complete.
    value = intact(stage.result, lambda file: json.loads(file.read_text()))
    return marker.result == "" and _holds(value, json.loads(json.dumps(marker.claim)))


def _write(out: Path, name: str, marker: Marker) -> None:
    with replacing(marker_file(out, name)) as temporary:
        temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(marker)}, indent=1) + "\n")


def _hash(file: Path) -> str:
    """Of its content; empty without a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _holds(value: Any, claim: Any) -> bool:
    """Whether a JSON value has all that is claimed of it, at any depth."""
    if isinstance(claim, dict):
        return isinstance(value, dict) and all(key in value and _holds(value[key], claim[key]) for key in claim)
    return bool(value == claim)
