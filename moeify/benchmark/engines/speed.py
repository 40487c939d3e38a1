"""Times GGUF files by llama-bench, in turn: a drift of the machine hits all alike, and ratios are of one round."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.benchmark.engines.programs import Failure, objects, run
from moeify.benchmark.engines.results import EngineSpeed
from moeify.options import Track, untracked

# Of llama-bench's test tg32.
DECODED_TOKENS = 32
PHASES = ("prefill", "decode")
# Phase, tokens, threads.
Regime = tuple[str, int, int]


@dataclass(frozen=True)
class Contestant:
    """A file to be timed.

    Args:
        model: name of its model.
        type: of its weights.
        path: of the file.
        over: index of the file in whose times its own are given; None for a dense one.
    """

    model: str
    type: str
    path: Path
    over: int | None


@dataclass(frozen=True)
class Plan:
    """How files are timed.

    Args:
        program: llama-bench.
        prompts: tokens that are read at once.
        threads: numbers of them.
        rounds: passes of each file and regime.
        on_cpu: keep all layers there, whatever the program was built for.
        limit_seconds: of one call.
    """

    program: Path
    prompts: tuple[int, ...]
    threads: tuple[int, ...]
    rounds: int
    on_cpu: bool
    limit_seconds: float


def measure_speed(
    files: Sequence[Contestant], plan: Plan, track: Track[Any] = untracked
) -> tuple[list[EngineSpeed], dict[int, str], str]:
    """Time all files.

    In each round every file is timed once with each number of threads, another one first than in the round before. A
    file that fails leaves.

    Args:
        files: what is timed.
        plan: how.
        track: wraps the loop over calls.

    Returns:
        rows; why a file has none, by its index; the program's version.
    """
    seconds: dict[tuple[int, Regime], list[float]] = defaultdict(list)
    failed: dict[int, str] = {}
    version = ""
    turns = [
        (threads, (index + turn) % len(files))
        for turn in range(plan.rounds)
        for threads in plan.threads
        for index in range(len(files))
    ]
    for threads, index in track(turns, "llama-bench", len(turns)):
        if index in failed:
            continue
        try:
            times, version = _time(files[index].path, plan, threads)
        except Failure as failure:
            failed[index] = str(failure)
            continue
        for regime, value in times.items():
            seconds[index, regime].append(value)
    rows = [
        _row(files[index], regime, values, [] if (over := files[index].over) is None else seconds[over, regime])
        for (index, regime), values in list(seconds.items())
        if index not in failed
    ]
    order = {(file.model, file.type): index for index, file in enumerate(files)}
    rows.sort(key=lambda row: (PHASES.index(row.phase), row.num_tokens, row.threads, order[row.model, row.type]))
    return rows, failed, version


def _time(file: Path, plan: Plan, threads: int) -> tuple[dict[Regime, float], str]:
    """Seconds of every regime of one number of threads, once; and the program's version."""
    words = ["-m", str(file), "-p", ",".join(map(str, plan.prompts)), "-n", str(DECODED_TOKENS), "-t", str(threads)]
    words += ["-r", "1", "-o", "json", *(("-ngl", "0") if plan.on_cpu else ())]
    values = objects(run(plan.program, *words, limit_seconds=plan.limit_seconds).stdout)
    times: dict[Regime, float] = {}
    try:
        for value in values:
            prompt, decoded = int(value["n_prompt"]), int(value["n_gen"])
            regime = ("decode", decoded, threads) if decoded else ("prefill", prompt, threads)
            times[regime] = float(value["avg_ns"]) / 1e9
    except (KeyError, TypeError, ValueError) as error:
        raise Failure(f"its JSON has another form than expected: {error!r}") from error
    regimes = {("prefill", length, threads) for length in plan.prompts} | {("decode", DECODED_TOKENS, threads)}
    if set(times) != regimes or min(times.values()) <= 0:
        raise Failure(f"it timed {sorted(times)}, asked for {sorted(regimes)}")
    return times, f"{values[0].get('build_number', '?')} ({values[0].get('build_commit', '?')})"


def _row(file: Contestant, regime: Regime, seconds: list[float], dense: list[float]) -> EngineSpeed:
    """Medians over rounds; without ratios if the dense file failed in one of them."""
    phase, num_tokens, threads = regime
    middle = statistics.median(seconds) / num_tokens
    ratios = [own / other for own, other in zip(seconds, dense, strict=True)] if len(dense) == len(seconds) else []
    return EngineSpeed(
        model=file.model,
        engine="llama.cpp",
        type=file.type,
        threads=threads,
        phase=phase,
        num_tokens=num_tokens,
        ms_per_token=1e3 * middle,
        tokens_per_second=1 / middle,
        time_over_dense=statistics.median(ratios) if ratios else None,
        time_over_dense_low=min(ratios, default=None),
        time_over_dense_high=max(ratios, default=None),
        num_rounds=len(seconds),
    )
