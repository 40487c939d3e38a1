"""`moeify bench`: whole models beside the dense one they came from."""

from moeify.benchmark.options import BenchOptions
from moeify.cli import options as option
from moeify.command_line import command_line
from moeify.errors import CheckError


def bench_command(
    models: option.Benched,
    *,
    against: option.Against,
    options: BenchOptions,
    baseline: option.Baseline = None,
    threshold: option.Threshold = 1.05,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    output: option.Output,
) -> None:
    """Measure size, quality, speed and memory of converted models beside the dense one they came from."""
    from moeify.benchmark.models.run import bench
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.bench import model_bench_tables

    renderer = renderer_for(output)
    result = bench(
        models,
        against,
        options,
        out=out,
        overwrite=overwrite,
        baseline=baseline,
        threshold=threshold,
        track=renderer.track,
    )
    renderer.result(result, *model_bench_tables(result), next_step=command_line("report", str(out)) if out else "")
    worse = result.regressions.worse if result.regressions else []
    if worse:
        count = "1 number is" if len(worse) == 1 else f"{len(worse)} numbers are"
        raise CheckError(
            f"{count} worse than in {baseline}, the first: {worse[0].what} of {worse[0].row} is "
            f"{worse[0].ratio:.2f} times what it was",
            f"--threshold allows {threshold:g}",
        )
