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
from moeify.benchmark.layers.cases import Case
from moeify.benchmark.layers.measure import DeviceError, measure
from moeify.benchmark.layers.peers import PEERS, find_peers
from moeify.benchmark.layers.results import LayerBench
from moeify.benchmark.machine import device_by_name, dtype_by_name, machine_facts, versions
from moeify.benchmark.options import LayerBenchOptions
from moeify.benchmark.timing import release_memory, timer_for
from moeify.options import Track
from moeify.progress import shown
from moeify.results import check_new, check_writable, write


def layer_bench(
    cases: Sequence[Case],
    options: LayerBenchOptions | None = None,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    command: str = "",
    track: Track[Any] = shown,
) -> LayerBench:
    """Measure cases on peers.

    Args:
        cases: in the order they are run, see moeify.benchmark.layers.cases.cases.
        options: peers, times, device; their cases, tokens, routings and passes are in `cases` already. A peer that
            cannot run a case has a row that says why.
        out: JSON file, written after every case.
        command: kept in the result.

    Raises:
        UsageError: unknown peer, device or dtype.
        InputError: `out` exists, or its folder cannot be written.
    """
    began, options = time.monotonic(), options or LayerBenchOptions()
    limit = options.limit_seconds
    peers = find_peers(options.peers)
    timer = timer_for(device_by_name(options.device))
    dtype = dtype_by_name(options.dtype, timer.device)
    if out is not None:
        check_new(out, overwrite=overwrite)
        check_writable(out, LayerBench)
    result = LayerBench(
        machine=machine_facts(timer.device),
        versions=versions(["torch", "triton", *(name for peer in PEERS.values() for name in peer.packages)]),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        dtype=str(dtype).removeprefix("torch."),
        ceilings=measure_ceilings(timer, dtype),
    )
    _save(result, out)
    waiting = list(cases)
    for case in track(cases, "cases", len(cases)):
        if limit is not None and time.monotonic() - began > limit:
            result.stopped = f"the limit of {limit:g} s was reached"
            break
        try:
            result.rows += measure(case, peers, timer, result.ceilings, dtype, seconds=options.seconds_per_row)
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
    if out is not None:
        write(result, out)
