"""The layer benchmark where nothing is installed but torch, triton and transformers.

python -m moeify.benchmark.layers --cases llama3-8b-8/2 --tokens 1,8192 --out layer.json
"""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moeify.benchmark.layers import table
from moeify.benchmark.layers.cases import cases
from moeify.benchmark.layers.run import layer_bench
from moeify.benchmark.options import LayerBenchOptions
from moeify.command_line import command_line, fields, flag, help_text, is_repeated, parse
from moeify.errors import MoeifyError


def _progress(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
    """A line on stderr for every item, so that the log of a killed run says how far it came."""
    began = time.monotonic()
    for number, item in enumerate(items, start=1):
        print(f"{time.monotonic() - began:6.0f} s  {label} {number}/{total}  {item.name}", file=sys.stderr, flush=True)
        yield item


def parsed(arguments: Sequence[str] | None) -> tuple[LayerBenchOptions, Path | None, bool]:
    """The options, the file and whether it may be replaced, as `moeify bench-layer` has them.

    Raises:
        UsageError: a value that an option does not take.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moeify.benchmark.layers", description="Time one layer on every peer."
    )
    for field in fields(LayerBenchOptions):
        default = ", ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = help_text(field) + (f" [default: {default}]" if default not in ("", None) else "")
        parser.add_argument(flag(field.name), action="append", dest=field.name, help=text)
    parser.add_argument("-o", "--out", type=Path, help="FILE.json; written after every case.")
    parser.add_argument("--overwrite", action="store_true")
    words = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    for field in fields(LayerBenchOptions):
        if words[field.name]:
            items = parse(field, words[field.name])
            values[field.name] = items if is_repeated(field) else items[-1]
    return LayerBenchOptions(**values), words["out"], words["overwrite"]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m moeify.benchmark.layers`: returns the exit code."""
    try:
        options, out, overwrite = parsed(arguments)
        command = command_line("bench-layer", options, out=out, overwrite=overwrite)
        command = command.replace("moeify bench-layer", "python -m moeify.benchmark.layers", 1)
        result = layer_bench(cases(options), options, out=out, overwrite=overwrite, command=command, track=_progress)
    except MoeifyError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code
    print(table.text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
