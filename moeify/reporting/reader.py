"""Finds the results in a run's folder by their `schema` key, whatever the files are called.

Looked at are the .json files of the folder and of the folders in it. Of benchmark, comparison, search and recipe run
the newest counts; fine-tuning histories and checkpoint records are one a checkpoint, and all of them count.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from moeify.benchmark.models.results import ALL_TEXTS, ModelBench
from moeify.command_line import command_line
from moeify.errors import InputError
from moeify.readable import Readable
from moeify.results import find_kind, load_json, parse

if TYPE_CHECKING:
    from moeify.check.compare import Comparison
    from moeify.check.evaluate import Evaluation
    from moeify.check.loops import LoopResult
    from moeify.convert.search import SearchResult
    from moeify.recipes.run import RunResult
    from moeify.training.finetune import StageHistory

T = TypeVar("T")
MENTIONS_SCHEMA = re.compile(rb'"moeify\.[a-z-]+/\d+"')
# Of the first the newest counts, of the others each checkpoint has its own.
SINGLE, SEVERAL = ("bench", "compare", "search", "run", "eval"), ("finetune-history", "finetune", "record")


@dataclass(frozen=True, repr=False)
class Record(Readable):
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
class Training:
    """How a checkpoint was fine-tuned.

    Args:
        name: of the checkpoint.
        stages: in their order.
        seconds: that each took; None where nobody knows.
    """

    name: str
    stages: "tuple[StageHistory, ...]"
    seconds: tuple[float | None, ...]

    @staticmethod
    def curve(stage: "StageHistory") -> list[tuple[float, float]]:
        """(tokens, perplexity on held-out text) at each evaluation of a stage."""
        steps = [entry for entry in stage.history if isinstance(entry.get("step"), int)]
        rows = [entry for entry in steps if isinstance(entry.get("eval_perplexity"), float)]
        last = max((entry["step"] for entry in steps), default=0) or 1
        return [(stage.num_tokens * row["step"] / last, row["eval_perplexity"]) for row in rows]


@dataclass(frozen=True)
class RunFolder:
    """What a run's folder holds.

    Args:
        path: the folder.
        bench, compared, searched, ran, evaluated: the newest of each.
        tuned, records: of each checkpoint.
        notes: a sentence about every result that was left out.
    """

    path: Path
    bench: Source[ModelBench]
    compared: Source["Comparison"] | None
    searched: Source["SearchResult"] | None
    ran: Source["RunResult"] | None
    evaluated: Source["Evaluation"] | None
    tuned: tuple[Training, ...]
    records: tuple[Source[Record], ...]
    notes: tuple[str, ...]

    @property
    def loops(self) -> "tuple[LoopResult, ...]":
        """How answers end, of the recipe's models, or of those that were evaluated alone."""
        measured = (self.ran.value.loops if self.ran else (), self.evaluated.value.loops if self.evaluated else ())
        return next(filter(None, measured), ())

    @property
    def sources(self) -> Mapping[str, str]:
        """Kind -> file, of what counts once."""
        newest = (self.bench, self.compared, self.searched, self.ran, self.evaluated)
        single = dict(zip(SINGLE, newest, strict=True))
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
        message = f"{path} holds no model benchmark (moeify.bench/1), found: {seen or 'no result of moeify'}"
        raise InputError(message, command_line("bench", "MOE", against="MODEL", out=path))
    notes: list[str] = []
    bench, compared, searched, ran, evaluated = (_newest(name, sources[name], notes) for name in SINGLE)
    assert bench is not None
    _check_bench(path / bench.file, bench.value)
    tuned, records = tuple(_trainings(path, sources)), tuple(sources["record"])
    # What is measured later goes beside it, under its name.
    path = path if path.name not in ("", "..") else path.resolve()
    return RunFolder(path, bench, compared, searched, ran, evaluated, tuned, records, (*notes, *others))


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
    in_engines = [row.time_over_dense for row in bench.engine_speed if row.time_over_dense is not None]
    ratios = [*in_engines, *(row.time_over_dense for row in bench.verdicts), *(row.ratio for row in bench.quality)]
    if (least := min(ratios, default=1.0)) <= 0:
        raise InputError(f"{file} has a ratio of {least:g}, expected more than 0", "measure it again")
    texts = {row.data for row in bench.quality}
    if len(texts) > 1 and ALL_TEXTS not in texts:
        raise InputError(
            f"{file} was written by an earlier moeify: {len(texts)} texts, expected quality over {ALL_TEXTS} as well",
            f"measure it again: {bench.command}",
        )
    for name, layers in bench.experts.items():
        for layer in layers:
            widths = {len(layer.load), len(layer.top_tokens), *map(len, layer.texts.values())}
            if widths != {len(layers[0].load)} or layer.texts.keys() != layers[0].texts.keys():
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


def _trainings(path: Path, sources: Mapping[str, Sequence[Source[Any]]]) -> Iterator[Training]:
    """Those that the checkpoints hold, with curves; of others what `moeify finetune --json` printed, which has times.

    A recipe's run knows the time of a whole checkpoint, which is that of its stage if there is one.
    """
    printed = {source.value.out.name: source.value for source in sources["finetune"]}
    for source in sources["finetune-history"]:
        name, stages = (path / source.file).parent.name, source.value.stages
        if name in printed and len(printed[name].stages) == len(stages):
            seconds = tuple(stage.seconds for stage in printed.pop(name).stages)
        else:
            marker = _load(path / f"{name}.done") if (path / f"{name}.done").is_file() else {}
            whole = marker.get("seconds") if isinstance(marker, dict) else None
            seconds = (whole,) if len(stages) == 1 and isinstance(whole, float) else (None,) * len(stages)
        yield Training(name, stages, seconds)
    for name, result in printed.items():
        yield Training(name, result.history.stages, tuple(stage.seconds for stage in result.stages))
