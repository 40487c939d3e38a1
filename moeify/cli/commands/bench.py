"""`moeify bench`: whole models beside the dense one they came from, or one layer on every implementation."""

import shlex
import sys
from pathlib import Path
from typing import Any

from moeify.cli import options as option
from moeify.errors import CheckError, UsageError

LAYER_SECONDS = 0.3


def bench_command(
    models: option.Benched = [],  # noqa: B006
    against: option.Against = [],  # noqa: B006
    data: option.Data = ["builtin-heldout"],  # noqa: B006
    tokens: option.BenchTokens = None,
    context: option.Context = None,
    batch: option.Batches = "1,8",
    prompt: option.Prompts = "",
    implementation: option.Implementations = "",
    roofline: option.Roofline = False,
    baseline: option.Baseline = None,
    threshold: option.Threshold = 1.05,
    skip: option.Skip = [],  # noqa: B006
    layer: option.Layer = False,
    cases: option.Cases = "",
    routings: option.Routings = "",
    passes: option.Passes = "",
    peers: option.Peers = "",
    limit_seconds: option.LimitSeconds = None,
    device: option.Device = "auto",
    dtype: option.Dtype = "auto",
    seconds_per_row: option.SecondsPerRow = None,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Measure size, quality, speed and memory beside the dense model; with --layer, one layer on every kernel."""
    both: dict[str, Any] = {"device": device, "dtype": dtype, "out": out, "overwrite": overwrite}
    shown = (json, quiet, verbose)
    if layer:
        theirs = {
            "MOE": models,
            "--against": against,
            "--data": data != ["builtin-heldout"],
            "--context": context,
            "--batch": batch != "1,8",
            "--prompt": prompt,
            "--implementation": implementation,
            "--roofline": roofline,
            "--baseline": baseline,
            "--threshold": threshold != 1.05,
            "--skip": skip,
        }
        _refuse(theirs, "is for models", "leave --layer out, or this")
        seconds = LAYER_SECONDS if seconds_per_row is None else seconds_per_row
        both |= {"seconds_per_row": seconds, "limit_seconds": limit_seconds}
        _bench_layer((cases, tokens or "", routings, passes), peers, both, shown)
        return
    theirs = {
        "--cases": cases,
        "--routings": routings,
        "--passes": passes,
        "--peers": peers,
        "--limit-seconds": limit_seconds,
    }
    _refuse(theirs, "is for a layer", "add --layer and name no model, or leave this out")
    if not models:
        raise UsageError(
            "nothing to measure was named", "write moeify bench MOE --against DENSE, or moeify bench --layer"
        )
    values: dict[str, Any] = {
        "data": tuple(data),
        "context": context,
        "batch": _numbers(batch, "--batch"),
        "prompt": _numbers(prompt, "--prompt"),
        "implementation": tuple(_parts(implementation)),
        "roofline": roofline,
        "skip": tuple(skip),
        "device": device,
        "dtype": dtype,
    }
    if tokens is not None:
        (values["tokens"],) = _numbers(tokens, "--tokens", only_one=True)
    if seconds_per_row is not None:
        values["seconds_per_row"] = seconds_per_row
    _bench_models(models, against, values, both, (baseline, threshold), shown)


def _bench_models(
    models: list[str],
    against: list[str],
    values: dict[str, Any],
    both: dict[str, Any],
    limit: tuple[Path | None, float],
    shown: tuple[bool, bool, bool],
) -> None:
    from moeify.benchmark.models.inputs import BenchOptions
    from moeify.benchmark.models.run import bench
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.bench import model_bench_tables

    renderer = renderer_for(*shown)
    baseline, threshold = limit
    out: Path | None = both["out"]
    result = bench(
        models,
        against,
        BenchOptions(**values),
        out=out,
        overwrite=both["overwrite"],
        baseline=baseline,
        threshold=threshold,
        command=_command(),
        track=renderer.track,
    )
    step = f"moeify report {out}" if out else ""
    renderer.result("bench", result, *model_bench_tables(result), next_step=step)
    worse = result.regressions.worse if result.regressions else []
    if worse:
        count = "1 number is" if len(worse) == 1 else f"{len(worse)} numbers are"
        raise CheckError(
            f"{count} worse than in {baseline}, the first: {worse[0].what} of {worse[0].row} is "
            f"{worse[0].ratio:.2f} times what it was",
            f"--threshold allows {threshold:g}",
        )


def _bench_layer(
    asked: tuple[str, str, str, str], peers: str, both: dict[str, Any], shown: tuple[bool, bool, bool]
) -> None:
    from moeify.benchmark.layers.run import ask, layer_bench
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.bench import layer_bench_tables

    renderer = renderer_for(*shown)
    result = layer_bench(ask(*asked), peers=_parts(peers), command=_command(), track=renderer.track, **both)
    renderer.result("layer-bench", result, *layer_bench_tables(result))


def _refuse(options: dict[str, Any], reason: str, hint: str) -> None:
    """Raise UsageError if one of them was given."""
    for name, given in options.items():
        # Zero seconds are given, too.
        if given or (given == 0 and given is not False):
            raise UsageError(f"{name} {reason}", hint)


def _numbers(text: str, name: str, *, only_one: bool = False) -> tuple[int, ...]:
    """Whole numbers between commas.

    Raises:
        UsageError: something else is there.
    """
    example = f"write {name} {'8192' if only_one else '1,8'}"
    try:
        found = tuple(int(part) for part in _parts(text))
    except ValueError as error:
        raise UsageError(
            f"{name} {text} is no {'whole number' if only_one else 'list of whole numbers'}", example
        ) from error
    if only_one and len(found) != 1:
        raise UsageError(f"{name} {text} is not one number; lists of them are for --layer", example)
    return found


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _command() -> str:
    return shlex.join(["moeify", *sys.argv[1:]])
