"""The layer benchmark: one FFN or MoE layer on every implementation there is, in one process, beside its floor.

    python -m moeify.layer_bench --cases llama3-8b-8/2 --tokens 1,8192 --out layer.json

is `moeify bench --layer` with nothing installed but torch, triton and transformers. Traps: times of two runs differ by
more than those of one run, so compare within a run; a peer that waits for the device (`method` "stream") pays for its
launches in `us`, which is what it costs but not what its kernels take.
"""

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moeify.benchmark.cases import PASSES, ROUTINGS, SHAPES, TOKENS, Case, cases
from moeify.benchmark.ceilings import measure_ceilings
from moeify.benchmark.machine import device_by_name, dtype_by_name, machine_facts, versions
from moeify.benchmark.measure import DeviceError, measure
from moeify.benchmark.peers import PEERS, find_peers
from moeify.benchmark.results import LayerBench
from moeify.benchmark.table import markdown as table
from moeify.benchmark.table import text
from moeify.benchmark.timing import release_memory, timer_for
from moeify.errors import InputError, MoeifyError, UsageError
from moeify.options import Track, untracked

__all__ = ["LayerBench", "layer_bench", "main", "table"]

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


def _progress(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """A line on stderr for every item, so that the log of a killed run says how far it came."""
    began = time.monotonic()
    for number, item in enumerate(items, start=1):
        print(f"{time.monotonic() - began:6.0f} s  {label} {number}/{total}  {item.name}", file=sys.stderr, flush=True)
        yield item


def ask(shapes: str, tokens: str, routings: str, passes: str) -> list[Case]:
    """Cases from comma-separated lists; an empty one stands for all there are.

    Raises:
        UsageError: a name is unknown or a number is none.
    """
    try:
        counts = [int(part) for part in _parts(tokens)]
    except ValueError as error:
        raise UsageError(f"--tokens {tokens} is no list of whole numbers", "write --tokens 1,8,512") from error
    return cases(
        _parts(shapes) or tuple(SHAPES), counts or TOKENS, _parts(routings) or ROUTINGS, _parts(passes) or PASSES
    )


def _parts(names: str) -> list[str]:
    return [part.strip() for part in names.split(",") if part.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m moeify.layer_bench`: returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m moeify.layer_bench", description="Time one layer on every peer.")
    parser.add_argument("--cases", default=",".join(SHAPES), help="shapes: %(default)s, or any like 64x256-8/2+2")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="%(default)s")
    parser.add_argument("--routings", default=",".join(ROUTINGS), help="%(default)s")
    parser.add_argument("--passes", default=",".join(PASSES), help="%(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="%(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--seconds-per-row", type=float, default=SECONDS_PER_ROW, help="%(default)s")
    parser.add_argument("--limit-seconds", type=float, help="begin no case after that")
    parser.add_argument("--out", type=Path, help="JSON file, written after every case")
    parser.add_argument("--overwrite", action="store_true")
    asked = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        result = layer_bench(
            ask(asked.cases, asked.tokens, asked.routings, asked.passes),
            peers=_parts(asked.peers),
            device=asked.device,
            dtype=asked.dtype,
            seconds_per_row=asked.seconds_per_row,
            limit_seconds=asked.limit_seconds,
            out=asked.out,
            overwrite=asked.overwrite,
            command=shlex.join(["python", "-m", "moeify.layer_bench", *words]),
            track=_progress,
        )
    except MoeifyError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
