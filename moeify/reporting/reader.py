"""Finds the results in a run's folder by their `schema` key, whatever the files are called.

Looked at are the .json files of the folder and of the folders in it. Of benchmark, comparison, search and recipe run
the newest counts; fine-tuning histories and checkpoint records are one a checkpoint, and all of them count.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from moeify.benchmark.models.results import ModelBench
from moeify.command_line import command_line
from moeify.errors import InputError
from moeify.results import find_kind, load_json, parse

if TYPE_CHECKING:
    from moeify.check.compare import Comparison
    from moeify.convert.search import SearchResult
    from moeify.recipes.run import RunResult
    from moeify.training.finetune import FinetuneHistory

T = TypeVar("T")
MENTIONS_SCHEMA = re.compile(rb'"moeify\.[a-z-]+/\d+"')
# Of these the newest counts.
SINGLE = ("bench", "compare", "search", "run")
# Of these each checkpoint has its own.
SEVERAL = ("finetune-history", "finetune", "record")


@dataclass(frozen=True)
class Record:
    """moeify.json of a checkpoint: how it was made, and its numbers of parameters if it was cut."""

    job: Mapping[str, Any]
    parameters: int | None = None
    active_parameters: int | None = None


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
    compared: Source["Comparison"] | None
    searched: Source["SearchResult"] | None
    ran: Source["RunResult"] | None
    tuned: tuple[Source["FinetuneHistory"], ...]
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
        what = "a file" if path.exists() else "not a folder"
        raise InputError(f"{path} is {what}, expected the folder of a run", "name the folder that holds bench.json")
    sources: dict[str, list[Source[Any]]] = {name: [] for name in (*SINGLE, *SEVERAL)}
    others: list[str] = []
    for file in _files(path):
        values = _load(file)
        schema = str(values.get("schema", "")) if isinstance(values, dict) else ""
        name = schema.removeprefix("moeify.").split("/")[0] if schema.startswith("moeify.") else ""
        place = str(file.relative_to(path))
        if name in sources:
            value = parse(values, find_kind(name), file, finite=name == "bench")
            sources[name].append(Source(place, _when(file, values.get("date")), value))
        elif name:
            others.append(f"{place} ({schema}) is not shown.")
    if not sources["bench"]:
        seen = ", ".join(sorted(f"moeify.{name}/1" for name, files in sources.items() if files))
        raise InputError(
            f"{path} holds no model benchmark (moeify.bench/1), found: {seen or 'no result of moeify'}",
            command_line("bench", "MOE", against="MODEL", out=path),
        )
    notes: list[str] = []
    newest = {name: _newest(name, sources[name], notes) for name in SINGLE}
    bench = newest["bench"]
    assert bench is not None
    _check_bench(path / bench.file, bench.value)
    return RunFolder(
        path=path,
        bench=bench,
        compared=newest["compare"],
        searched=newest["search"],
        ran=newest["run"],
        tuned=_histories(sources, notes),
        records=tuple(sources["record"]),
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


def _load(file: Path) -> Any:
    """The JSON of a file that names a schema of moeify; None for any other file, whatever it holds."""
    try:
        is_result = MENTIONS_SCHEMA.search(file.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}", "is it readable?") from error
    return load_json(file) if is_result else None


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
                sizes = ", ".join(map(str, sorted(widths)))
                message = f"{file}: {name}, layer {layer.layer} has tables of {sizes} experts"
                raise InputError(f"{message}, expected {len(layers[0].load)} everywhere", "measure it again")


def _when(file: Path, date: Any) -> datetime:
    """When a result was made: its own date, or the file's."""
    try:
        when = datetime.fromisoformat(str(date))
    except ValueError:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _newest(name: str, sources: Sequence[Source[Any]], notes: list[str]) -> Source[Any] | None:
    """The newest; a note says what it was preferred to."""
    if not sources:
        return None
    newest = max(sources, key=lambda source: (source.when, source.file))
    if len(sources) > 1:
        rest = ", ".join(source.file for source in sources if source is not newest)
        notes.append(f"Of {len(sources)} results of {name} the newest counts: {newest.file}, not {rest}.")
    return newest


def _histories(sources: Mapping[str, Sequence[Source[Any]]], notes: list[str]) -> "tuple[Source[FinetuneHistory], ...]":
    """Those that the checkpoints hold; without any, those that `moeify finetune --json` printed, which say less."""
    histories, printed = sources["finetune-history"], sources["finetune"]
    if histories and printed:
        notes.append(f"{', '.join(source.file for source in printed)}: the histories in the checkpoints count instead.")
    return tuple(histories or (replace(source, value=source.value.history) for source in printed))
