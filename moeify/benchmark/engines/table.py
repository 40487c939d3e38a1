"""Rows of other engines as tables for the terminal: files, and times side by side; what cannot run is a note."""

from collections.abc import Iterator

from moeify.benchmark.engines.results import EngineFile, EngineSpeed
from moeify.benchmark.grid import Grid
from moeify.benchmark.models.results import ModelBench
from moeify.words import between, fixed, on_one_line

WORDS = ("model", "type")


def grids(result: ModelBench) -> Iterator[Grid]:
    """One of files, and one a regime."""
    files = tuple(
        (
            row.model,
            row.type,
            fixed(row.num_bytes / 1e6, 1),
            fixed(row.perplexity, 2),
            fixed(row.over_transformers, 4),
            fixed(row.over_dense, 3),
        )
        for row in result.engine_files
        if row.num_bytes is not None
    )
    columns = ("model", "type", "MB", "perplexity", "/transformers", "/dense")
    yield Grid("files in llama.cpp, which scores the second half of each block", columns, files, WORDS, num_keys=2)
    for regime in dict.fromkeys(map(_regime, result.engine_speed)):
        times = tuple(
            (
                row.model,
                row.type,
                str(row.threads),
                fixed(row.ms_per_token, 3),
                fixed(row.tokens_per_second, 1),
                fixed(row.time_over_dense, 2),
                between(row.time_over_dense_low, row.time_over_dense_high, 2),
            )
            for row in result.engine_speed
            if _regime(row) == regime
        )
        names = ("model", "type", "threads", "ms/token", "tokens/s", "/dense", "rounds")
        yield Grid(f"{regime} in llama.cpp", names, times, WORDS, num_keys=2)


def _regime(row: EngineSpeed) -> str:
    return f"{row.phase} {row.num_tokens}"


def notes(result: ModelBench) -> list[str]:
    """Why numbers are missing."""
    return [f"{_name(row)} in {row.engine}: {row.reason}" for row in result.engine_files if row.reason]


def _name(row: EngineFile) -> str:
    return on_one_line(f"{row.model} ({row.type})")
