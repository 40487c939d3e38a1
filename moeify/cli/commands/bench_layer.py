"""`moeify bench-layer`: one layer on every implementation."""

from moeify.benchmark.options import LayerBenchOptions
from moeify.cli import options as option
from moeify.command_line import command_line


def bench_layer_command(
    *,
    options: LayerBenchOptions,
    out: option.LayerOut = None,
    overwrite: option.Overwrite = False,
    output: option.Output,
) -> None:
    """Time one FFN or MoE layer on every implementation.

    Example:
        moeify bench-layer --cases llama3-8b-8/2 --tokens 1,64
    """
    from moeify.benchmark.layers.cases import cases
    from moeify.benchmark.layers.run import layer_bench
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.bench import layer_bench_tables

    renderer = renderer_for(output)
    command = command_line("bench-layer", options, out=out, overwrite=overwrite)
    result = layer_bench(cases(options), options, out=out, overwrite=overwrite, command=command, track=renderer.track)
    renderer.result(result, *layer_bench_tables(result))
