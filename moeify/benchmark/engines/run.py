"""Models in llama.cpp: folders become GGUF files of the types asked for, all files are scored, then timed in turn.

A file that cannot be written, or that the engine refuses, crashes on or hangs with, is a row with its reason.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moeify.benchmark.engines.headers import model_of_file, vocab_size
from moeify.benchmark.engines.perplexity import Text, file_perplexity, folder_perplexity
from moeify.benchmark.engines.programs import BENCH, PERPLEXITY, Failure, find, needed
from moeify.benchmark.engines.results import EngineFile, EngineSpeed
from moeify.benchmark.engines.speed import Contestant, Plan, measure_speed
from moeify.benchmark.models.inputs import (
    Entrant,
    check_dense,
    check_vocabularies,
    dtype_of,
    model_of,
    open_entrant,
)
from moeify.benchmark.models.results import Model
from moeify.benchmark.options import BenchOptions
from moeify.check.perplexity import DEFAULT_CONTEXT
from moeify.errors import DiskError, InputError
from moeify.models.gguf import Header, read_header
from moeify.options import ExportOptions, Track, untracked
from moeify.words import on_one_line

SUFFIX = ".gguf"
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, general.file_type; K-quants by their usual names.
FILE_TYPES: Mapping[int, str] = {
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    7: "q8_0",
    8: "q5_0",
    9: "q5_1",
    10: "q2_k",
    11: "q3_k_s",
    12: "q3_k_m",
    13: "q3_k_l",
    14: "q4_k_s",
    15: "q4_k_m",
    16: "q5_k_s",
    17: "q5_k_m",
    18: "q6_k",
    32: "bf16",
}
CPU = torch.device("cpu")
PROMPTS = (128, 512)


@dataclass(frozen=True)
class Subject:
    """One model: its name in the result, and the folder or GGUF file where it is."""

    name: str
    path: Path

    @property
    def is_file(self) -> bool:
        return self.path.suffix == SUFFIX


@dataclass
class EngineRows:
    """All rows of an engine.

    Args:
        version: of its programs; "" if none ran.
        files, speed: rows; the dense model's first.
    """

    version: str = ""
    files: list[EngineFile] = field(default_factory=list)
    speed: list[EngineSpeed] = field(default_factory=list)


def is_file(word: str) -> bool:
    """Whether a model that was asked for is a GGUF file, which is taken as it is."""
    path = Path(word).expanduser()
    return path.suffix == SUFFIX and path.is_file()


def check_programs() -> None:
    """Refuse, before the work, what could not be timed after it.

    Raises:
        InputError: llama.cpp is not here.
    """
    needed(BENCH)


@dataclass(frozen=True)
class Opened:
    """All models of a run, the dense one first, before they are measured.

    Args:
        models: their sizes.
        subjects: where they are.
        context: tokens of a block of text.
        dtype: of the weights, or their types.
    """

    models: list[Model]
    subjects: list[Subject]
    context: int
    dtype: str


def subject(one: Entrant) -> Subject:
    """Of a model that was opened for transformers; a GGUF file goes into the engine as it is."""
    return Subject(one.name, Path(one.source).expanduser() if is_file(one.source) else one.path)


def open_models(named: Sequence[tuple[str, str]], options: BenchOptions, track: Track[Any]) -> Opened:
    """Models that transformers need not know: folders, and GGUF files of any architecture.

    Args:
        named: name and word of each, the dense one first.
        options: context and dtype.
        track: wraps a download.

    Raises:
        InputError: a model is not there, is of no use or has another vocabulary; the first one has experts.
    """
    opened = [
        read_header(Path(word).expanduser()) if is_file(word) else open_entrant(name, word, track)
        for name, word in named
    ]
    limits = [int(_limit(one)) for one in opened]
    context = options.context or min(DEFAULT_CONTEXT, *limits)
    if not 2 <= context <= min(limits):
        raise InputError(
            f"--context asks for {context} positions, all models take {min(limits)}",
            f"--context takes 2 to {min(limits)}",
        )
    models: list[Model] = []
    subjects = []
    for (name, word), one in zip(named, opened, strict=True):
        dense_ffn = models[0].parts["ffn"].parameters if models else None
        if isinstance(one, Header):
            models.append(model_of_file(name, word, one, dense_ffn, context=context))
            subjects.append(Subject(name, Path(word).expanduser()))
        else:
            ffn, element = one.anatomy.parts["ffn"].parameters, dtype_of(options.dtype, one.config, CPU).itemsize
            models.append(model_of(one, dense_ffn or ffn, context=context, element_bytes=element))
            subjects.append(subject(one))
    check_dense(named[0][1], models[0].num_experts)
    sizes = [vocab_size(one) if isinstance(one, Header) else one.anatomy.vocab_size for one in opened]
    check_vocabularies([(word, size) for (_, word), size in zip(named, sizes, strict=True)])
    types = [kind for one in subjects for kind in ((_type_of(one.path),) if one.is_file else options.type)]
    return Opened(models, subjects, context, ", ".join(dict.fromkeys(types)))


def _limit(one: Header | Entrant) -> int:
    """Positions that a model takes."""
    if isinstance(one, Header):
        return int(one.own.get("context_length") or DEFAULT_CONTEXT)
    return int(one.config.max_position_embeddings)


def measure(
    subjects: Sequence[Subject], options: BenchOptions, *, context: int, track: Track[Any] = untracked
) -> EngineRows:
    """Score and time all models in llama.cpp.

    Args:
        subjects: the dense one first.
        options: what is measured.
        context: tokens of a block of text.
        track: wraps long loops.

    Raises:
        InputError: llama-bench is not here, or a text cannot be read.
        DiskError: no room for the files.
    """
    program = needed(BENCH)
    with tempfile.TemporaryDirectory(prefix="moeify-gguf-") as place:
        folder = Path(place)
        rows, paths = _files(subjects, options.type, folder, track)
        if "quality" not in options.skip:
            text = Text.of(options.data[0], tokens=options.tokens, context=context)
            rows = _score(rows, paths, subjects, _Scorer(text, folder / "text.txt", options.limit_seconds), track)
        result = EngineRows(files=rows)
        if "speed" not in options.skip:
            plan = Plan(
                program,
                options.prompt or PROMPTS,
                options.threads or tuple(dict.fromkeys((1, os.cpu_count() or 1))),
                options.rounds,
                options.device == "cpu",
                options.limit_seconds,
            )
            _time(result, paths, plan, track)
    return result


def _files(
    subjects: Sequence[Subject], types: Sequence[str], folder: Path, track: Track[Any]
) -> tuple[list[EngineFile], dict[int, Path]]:
    """A row a file; the paths of those that are there, by the row's index."""
    rows: list[EngineFile] = []
    paths: dict[int, Path] = {}
    asked = [(one, kind) for one in subjects for kind in ((_type_of(one.path),) if one.is_file else types)]
    for one, kind in track(asked, "writing GGUF files", len(asked)):
        row, index = EngineFile(one.name, "llama.cpp", kind), len(rows)
        try:
            paths[index] = one.path if one.is_file else _export(one.path, folder / f"{index}{SUFFIX}", kind)
            row = replace(row, num_bytes=paths[index].stat().st_size)
        except DiskError:
            raise
        except InputError as error:
            row = replace(row, reason=f"no file: {on_one_line(error)}")
        rows.append(row)
    return rows, paths


def _export(source: Path, file: Path, kind: str) -> Path:
    from moeify.export.gguf.export import export_gguf

    export_gguf(source, file, ExportOptions(type=kind))
    return file


def _type_of(file: Path) -> str:
    """The type that a file says it has."""
    number = read_header(file).metadata.get("general.file_type")
    return FILE_TYPES.get(number, f"file type {number}") if isinstance(number, int) else "as it is"


def _over(rows: Sequence[EngineFile], index: int) -> int | None:
    """Of the dense model's files that a row is compared with: of the same type, else the first; None for its own."""
    dense = [other for other, row in enumerate(rows) if row.model == rows[0].model]
    if index in dense:
        return None
    return next((other for other in dense if rows[other].type == rows[index].type), dense[0])


class _Scorer:
    """Perplexities of one text; a folder's is computed once for all of its files."""

    def __init__(self, text: Text, text_file: Path, limit_seconds: float) -> None:
        self._text, self._file, self._limit_seconds = text, text_file, limit_seconds
        self._stock: dict[Path, float] = {}
        text_file.write_text(text.text, encoding="utf-8")

    def file(self, path: Path, program: Path) -> float:
        """By llama-perplexity."""
        return file_perplexity(path, self._file, self._text, program, self._limit_seconds)

    def folder(self, one: Subject) -> float | None:
        """By transformers; None for a file."""
        if not one.is_file and one.path not in self._stock:
            self._stock[one.path] = folder_perplexity(one.path, self._text, "cpu")
        return self._stock.get(one.path)


def _score(
    rows: list[EngineFile], paths: dict[int, Path], subjects: Sequence[Subject], scorer: _Scorer, track: Track[Any]
) -> list[EngineFile]:
    """With perplexities."""
    program = find(PERPLEXITY)
    if program is None:
        return [replace(row, reason=row.reason or f"no perplexity: {PERPLEXITY} is not there") for row in rows]
    places = {one.name: one for one in subjects}
    for index, path in track(list(paths.items()), "perplexity in llama.cpp", len(paths)):
        try:
            value = scorer.file(path, program)
        except Failure as failure:
            rows[index] = replace(rows[index], reason=f"no perplexity: {failure}")
            continue
        other = scorer.folder(places[rows[index].model])
        rows[index] = replace(rows[index], perplexity=value, over_transformers=value / other if other else None)
    for index, row in enumerate(rows):
        over = _over(rows, index)
        dense = None if over is None else rows[over].perplexity
        if row.perplexity is not None and dense is not None:
            rows[index] = replace(row, over_dense=row.perplexity / dense)
    return rows


def _time(result: EngineRows, paths: dict[int, Path], plan: Plan, track: Track[Any]) -> None:
    """Add rows of speed, and the reasons of files that have none."""
    places = list(paths)
    files = []
    for index in places:
        row, over = result.files[index], _over(result.files, index)
        files.append(Contestant(row.model, row.type, paths[index], places.index(over) if over in paths else None))
    if not files:
        return
    result.speed, failed, result.version = measure_speed(files, plan, track)
    for place, reason in failed.items():
        row = result.files[places[place]]
        result.files[places[place]] = replace(row, reason=f"cannot run: {reason}")
