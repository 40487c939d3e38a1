"""The layer benchmark: one FFN or MoE layer on every implementation there is, in one process, beside its floor.

Traps: times of two runs differ by
more than those of one run, so compare within a run; a peer that waits for the device (`method` "stream") pays for its
launches in `us`, which is what it costs but not what its kernels take.
"""

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeify.benchmark.ceilings import measure_ceilings
from moeify.benchmark.layers.cases import PASSES, ROUTINGS, SHAPES, TOKENS, Case, cases
from moeify.benchmark.layers.measure import DeviceError, measure
from moeify.benchmark.layers.peers import PEERS, find_peers
from moeify.benchmark.layers.results import LayerBench
from moeify.benchmark.machine import device_by_name, dtype_by_name, machine_facts, versions
from moeify.benchmark.timing import release_memory, timer_for
from moeify.errors import InputError, UsageError
from moeify.options import Track, untracked

# How long a peer is timed on a case.
SECONDS_PER_ROW = 0.3


def layer_bench(
    found: Sequence[Case],
    *,
    peers: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    seconds_per_row: float = SECONDS_PER_ROW,
    limit_seconds: float | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    command: str = "",
    track: Track[Any] = untracked,
) -> LayerBench:
    """Measure cases on peers.

    Args:
        found: in the order they are run, see moeify.benchmark.cases.cases.
        peers: their names; all of them if empty. One that cannot run a case has a row that says why.
        device: cuda, cpu, or auto: cuda if there is one.
        dtype: a torch dtype, or auto: bfloat16 on cuda, float32 on cpu.
        seconds_per_row: how long one peer is timed on one case; preparing it comes on top.
        limit_seconds: no case is begun after that; None for no limit.
        out: JSON file, written after every case.
        command: kept in the result.

    Raises:
        UsageError: unknown peer, device or dtype.
        InputError: `out` exists, or its folder cannot be written.
    """
    began = time.monotonic()
    chosen = find_peers(peers)
    timer = timer_for(device_by_name(device))
    kind = dtype_by_name(dtype, timer.device)
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"{out} exists", "--overwrite replaces it")
    result = LayerBench(
        machine=machine_facts(timer.device),
        versions=versions(["torch", "triton", *(name for peer in PEERS.values() for name in peer.packages)]),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        dtype=str(kind).removeprefix("torch."),
        ceilings=measure_ceilings(timer, kind),
    )
    _save(result, out)
    waiting = list(found)
    for case in track(found, "cases", len(found)):
        if limit_seconds is not None and time.monotonic() - began > limit_seconds:
            result.stopped = f"the limit of {limit_seconds:g} s was reached"
            break
        try:
            result.rows += measure(case, chosen, timer, result.ceilings, kind, seconds=seconds_per_row)
        except DeviceError as error:
            result.stopped = str(error)
            break
        waiting.remove(case)
        _save(result, out)
        release_memory()
    result.not_run = [case.name for case in waiting]
    _save(result, out)
    return result


def _save(result: LayerBench, out: Path | None) -> None:
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        result.save(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}", "choose another --out") from error


def ask(shapes: str, tokens: str, routings: str, passes: str) -> list[Case]:
    """Cases from comma-separated lists; an empty one stands for all there are.

    Raises:
        UsageError: a name is unknown or a number is none.
    """
    try:
        counts = [int(part) for part in names_of(tokens)]
    except ValueError as error:
        raise UsageError(f"--tokens {tokens} is no list of whole numbers", "write --tokens 1,8,512") from error
    return cases(
        names_of(shapes) or tuple(SHAPES), counts or TOKENS, names_of(routings) or ROUTINGS, names_of(passes) or PASSES
    )


def names_of(names: str) -> list[str]:
    """The names between the commas."""
    return [part.strip() for part in names.split(",") if part.strip()]
