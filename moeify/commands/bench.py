"""`moeify bench`: one layer on every implementation."""

import shlex
import sys

from moeify import cli_options as option
from moeify.errors import UsageError


def bench_command(
    layer: option.Layer = False,
    cases: option.Cases = "",
    tokens: option.CaseTokens = "",
    routings: option.Routings = "",
    passes: option.Passes = "",
    peers: option.Peers = "",
    device: option.Device = "auto",
    dtype: option.Dtype = "auto",
    seconds_per_row: option.SecondsPerRow = 0.3,
    limit_seconds: option.LimitSeconds = None,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Time a layer: the dense FFN, transformers' and others' MoE kernels and ours, beside the floor of this machine."""
    if not layer:
        raise UsageError("nothing to measure was named", "write moeify bench --layer")
    from moeify.layer_bench import ask, layer_bench
    from moeify.render import renderer_for
    from moeify.tables import layer_bench_tables

    renderer = renderer_for(json, quiet, verbose)
    result = layer_bench(
        ask(cases, tokens, routings, passes),
        peers=[name for name in peers.split(",") if name],
        device=device,
        dtype=dtype,
        seconds_per_row=seconds_per_row,
        limit_seconds=limit_seconds,
        out=out,
        overwrite=overwrite,
        command=shlex.join(["moeify", *sys.argv[1:]]),
        track=renderer.track,
    )
    renderer.result("layer-bench", result, *layer_bench_tables(result))
