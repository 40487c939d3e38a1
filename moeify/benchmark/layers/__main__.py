"""The layer benchmark where nothing is installed but torch, triton and transformers.

python -m moeify.benchmark.layers --cases llama3-8b-8/2 --tokens 1,8192 --out layer.json
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moeify.benchmark.layers.cases import PASSES, ROUTINGS, SHAPES, TOKENS
from moeify.benchmark.layers.peers import PEERS
from moeify.benchmark.layers.run import SECONDS_PER_ROW, ask, layer_bench, names_of
from moeify.benchmark.layers.table import text
from moeify.errors import MoeifyError


def _progress(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """A line on stderr for every item, so that the log of a killed run says how far it came."""
    began = time.monotonic()
    for number, item in enumerate(items, start=1):
        print(f"{time.monotonic() - began:6.0f} s  {label} {number}/{total}  {item.name}", file=sys.stderr, flush=True)
        yield item


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m moeify.benchmark.layers`: returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moeify.benchmark.layers", description="Time one layer on every peer."
    )
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
            peers=names_of(asked.peers),
            device=asked.device,
            dtype=asked.dtype,
            seconds_per_row=asked.seconds_per_row,
            limit_seconds=asked.limit_seconds,
            out=asked.out,
            overwrite=asked.overwrite,
            command=shlex.join(["python", "-m", "moeify.benchmark.layers", *words]),
            track=_progress,
        )
    except MoeifyError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
