"""Finds the results in a run's folder by their `schema` key, whatever the files are called.

Looked at are the .json files of the folder and of the folders in it. Of benchmark, comparison, search and recipe run
the newest counts; fine-tuning histories and checkpoint records are one a checkpoint, and all of them count.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from moeify.benchmark.models.results import SCHEMA as BENCH_SCHEMA
from moeify.benchmark.models.results import ModelBench
from moeify.errors import InputError

T = TypeVar("T")
MENTIONS_SCHEMA = re.compile(rb'"moeify\.[a-z-]+/\d+"')


class _Shown(BaseModel):
    """The part of a result that the report shows; what else the file holds is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CompareRow(_Shown):
    """One method at one budget: see moeify.check.compare.Row."""

    method: str
    budget: float
    perplexity: float | None


class Compared(_Shown):
    """What `moeify compare -o` wrote."""

    model: str
    rows: tuple[CompareRow, ...]


class SearchPoint(_Shown):
    """One choice: see moeify.convert.search.Point."""

    strategy: str
    share: float
    active_parameters: int
    perplexity: float | None


class Searched(_Shown):
    """What `moeify search -o` wrote."""

    model: str
    budget: float
    choice: SearchPoint
    uniform: SearchPoint
    frontier: tuple[SearchPoint, ...]
    dense_perplexity: float


class Limit(_Shown):
    """One limit of a recipe."""

    name: str
    measured: str
    allowed: str
    passed: bool


class Ran(_Shown):
    """What `moeify run` wrote."""

    out: str
    limits: tuple[Limit, ...]


class Stage(_Shown):
    """One stage of fine-tuning; the history is the trainer's, one entry a step or evaluation."""

    stage: str
    num_tokens: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    history: tuple[Mapping[str, Any], ...] = ()


class Tuned(_Shown):
    """What `moeify finetune` wrote."""

    stages: tuple[Stage, ...]


class Record(_Shown):
    """moeify.json of a checkpoint: how it was made."""

    job: Mapping[str, Any]


# What is read, by the name in its schema, and the version that is understood.
KINDS: Mapping[str, tuple[str, Any]] = {
    "bench": (BENCH_SCHEMA, ModelBench),
    "compare": ("moeify.compare/1", Compared),
    "search": ("moeify.search/1", Searched),
    "run": ("moeify.run/1", Ran),
    "finetune-history": ("moeify.finetune-history/1", Tuned),
    "finetune": ("moeify.finetune/1", Tuned),
    "record": ("moeify.record/1", Record),
}


@dataclass(frozen=True)
class Source(Generic[T]):
    """A result, the file it is from, relative to the run's folder, and when it was made."""

    file: str
    when: datetime
    value: T


@dataclass(frozen=True)
class RunFolder:
    """What a run's folder holds.

    Args:
        path: the folder.
        bench, compared, searched, ran: the newest of each.
        tuned, records: of each checkpoint.
        notes: a sentence about every result that was left out.
    """

    path: Path
    bench: Source[ModelBench]
    compared: Source[Compared] | None
    searched: Source[Searched] | None
    ran: Source[Ran] | None
    tuned: tuple[Source[Tuned], ...]
    records: tuple[Source[Record], ...]
    notes: tuple[str, ...]

    @property
    def sources(self) -> Mapping[str, str]:
        """Kind -> file, of what counts once."""
        single = {"bench": self.bench, "compare": self.compared, "search": self.searched, "run": self.ran}
        return {kind: source.file for kind, source in single.items() if source is not None}


def read_run(path: Path) -> RunFolder:
    """Read all results of a run.

    Raises:
        InputError: no such folder, no benchmark in it, or a result of moeify that cannot be read.
    """
    if not path.is_dir():
        what = "a file" if path.exists() else "no folder"
        raise InputError(f"{path} is {what}, expected the folder of a run", "name the folder that holds bench.json")
    found: dict[str, list[Source[Any]]] = {kind: [] for kind in KINDS}
    others: list[str] = []
    for file in _files(path):
        values = _parse(file)
        schema = str(values.get("schema", "")) if isinstance(values, dict) else ""
        kind = schema.removeprefix("moeify.").split("/")[0] if schema.startswith("moeify.") else ""
        name = str(file.relative_to(path))
        if kind in KINDS:
            found[kind].append(_source(file, name, KINDS[kind], values))
        elif kind:
            others.append(f"{name} ({schema}) is not shown.")
    if not found["bench"]:
        seen = (
            ", ".join(sorted({schema for kind, (schema, _) in KINDS.items() if found[kind]})) or "no result of moeify"
        )
        raise InputError(
            f"{path} holds no model benchmark ({BENCH_SCHEMA}), found: {seen}",
            f"moeify bench MOE --against MODEL -o {path}",
        )
    notes: list[str] = []
    newest = {kind: _newest(kind, found[kind], notes) for kind in ("bench", "compare", "search", "run")}
    bench = newest["bench"]
    assert bench is not None
    _check_bench(path / bench.file, bench.value)
    tuned = [*found["finetune-history"], *_without_history(found, notes)]
    return RunFolder(
        path=path,
        bench=bench,
        compared=newest["compare"],
        searched=newest["search"],
        ran=newest["run"],
        tuned=tuple(tuned),
        records=tuple(found["record"]),
        notes=(*notes, *others),
    )


def _files(folder: Path) -> list[Path]:
    """The .json files of a folder and of the folders in it; hidden ones and unfinished checkpoints are left out."""
    try:
        inner = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.suffix != ".partial"]
        folders = [folder, *(entry for entry in inner if not entry.name.startswith("."))]
        return [file for place in folders for file in sorted(place.glob("*.json")) if file.is_file()]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}", "is it readable?") from error


def _parse(file: Path) -> Any:
    """The JSON of a file that names a schema of moeify; None for any other file, whatever it holds."""
    hint = "measure it again, or move the file away"
    try:
        data = file.read_bytes()
        return json.loads(data, parse_constant=lambda _: None) if MENTIONS_SCHEMA.search(data) else None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", "is it readable?") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} names a schema of moeify but is not JSON: {error}", hint) from error


def _source(file: Path, name: str, kind: tuple[str, Any], values: dict[str, Any]) -> Source[Any]:
    expected, shape = kind
    if values["schema"] != expected:
        raise InputError(
            f"{file} has schema {values['schema']}, expected {expected}",
            "another version of moeify wrote it: measure again, or move the file away",
        )
    try:
        value = TypeAdapter(shape).validate_python({key: item for key, item in values.items() if key != "schema"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        message = f"{file}: {where}: {first['msg']}, found {first['input']!r:.60}"
        raise InputError(message, "measure it again, or move the file away") from error
    return Source(name, _when(file, values.get("date")), value)


def _check_bench(file: Path, bench: ModelBench) -> None:
    """Raise InputError unless there is something to compare, and what experts do is in shape."""
    kinds = [model.kind for model in bench.models]
    if not kinds or kinds[0] != "dense" or "moe" not in kinds:
        raise InputError(
            f"{file} measured {', '.join(kinds) or 'no model'}, expected a dense model first and a mixture of experts",
            "moeify bench MOE --against MODEL",
        )
    for name, layers in bench.experts.items():
        for layer in layers:
            num_experts = len(layer.load)
            widths = {num_experts, len(layer.coactivation), len(layer.top_tokens), *map(len, layer.coactivation)}
            if len(widths) > 1 or num_experts != len(layers[0].load):
                found = ", ".join(map(str, sorted(widths)))
                message = f"{file}: {name}, layer {layer.layer} has tables of {found} experts"
                raise InputError(f"{message}, expected {len(layers[0].load)} everywhere", "measure it again")


def _when(file: Path, date: Any) -> datetime:
    """When a result was made: its own date, or the file's."""
    try:
        when = datetime.fromisoformat(str(date))
    except ValueError:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _newest(kind: str, found: Sequence[Source[Any]], notes: list[str]) -> Source[Any] | None:
    """The newest; a note says what it was preferred to."""
    if not found:
        return None
    chosen = max(found, key=lambda source: (source.when, source.file))
    if len(found) > 1:
        rest = ", ".join(source.file for source in found if source is not chosen)
        notes.append(f"Of {len(found)} results of {kind} the newest counts: {chosen.file}, not {rest}.")
    return chosen


def _without_history(found: Mapping[str, Sequence[Source[Any]]], notes: list[str]) -> list[Source[Any]]:
    """What `moeify finetune --json` printed says less than the histories that the checkpoints hold."""
    printed = list(found["finetune"])
    if found["finetune-history"] and printed:
        notes.append(f"{', '.join(source.file for source in printed)}: the histories in the checkpoints count instead.")
        return []
    return printed
