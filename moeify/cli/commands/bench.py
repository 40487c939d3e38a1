"""`moeify bench`: whole models beside the dense one they came from."""

from moeify.benchmark.options import BenchOptions
from moeify.cli import options as option
from moeify.command_line import command_line, items
from moeify.errors import CheckError


def bench_command(
    models: option.Benched,
    *,
    against: option.Against,
    options: BenchOptions,
    baseline: option.Baseline = None,
    worse: option.Worse,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    output: option.Output,
) -> None:
    """Measure size, quality, speed and memory beside the dense model.

    Converted models beside the dense one that they came from; with -o, `moeify report` makes a page of it.

    Example:
        moeify bench my-moe --against builtin --batch 1 --prompt 64 -o my-bench
    """
    from moeify.benchmark.models.run import bench
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.bench import model_bench_tables

    renderer = renderer_for(output)
    result = bench(
        models,
        items(against),
        options,
        out=out,
        overwrite=overwrite,
        baseline=baseline,
        threshold=worse.threshold,
        track=renderer.track,
    )
    renderer.result(result, *model_bench_tables(result), next_step=command_line("report", str(out)) if out else "")
    numbers = result.regressions.worse if result.regressions else []
    if numbers:
        count = "1 number is" if len(numbers) == 1 else f"{len(numbers)} numbers are"
        raise CheckError(
            f"{count} worse than in {baseline}, the first: {numbers[0].what} of {numbers[0].row} is "
            f"{numbers[0].ratio:.2f} times what it was",
            f"--threshold allows {worse.threshold:g}",
        )
