"""`moeify compare`: methods side by side."""

from moeify.cli import options as option
from moeify.options import SplitOptions

DEFAULTS = SplitOptions()


def compare_command(
    model: option.Model,
    experts: option.Experts = DEFAULTS.experts,
    budget: option.Budgets = [0.75],  # noqa: B006
    data: option.Data = ["builtin-heldout"],  # noqa: B006
    data_tokens: option.DataTokens = 10_240,
    method: option.Methods = [],  # noqa: B006
    searched: option.Searched = [],  # noqa: B006
    refit_to: option.RefitTo = DEFAULTS.refit_to,
    calibration: option.Calibration = list(DEFAULTS.calibration),  # noqa: B006
    tokens: option.Tokens = DEFAULTS.tokens,
    context: option.Context = None,
    seed: option.Seed = DEFAULTS.seed,
    device: option.Device = DEFAULTS.device,
    out: option.CompareOut = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Measure methods side by side in one run: dense, oracle, static pruning, published methods, ours."""
    options = SplitOptions(
        experts=experts,
        refit_to=refit_to,
        calibration=tuple(calibration),
        tokens=tokens,
        context=context,
        seed=seed,
        device=device,
    )
    from moeify.check.compare import compare
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.compare import compare_tables
    from moeify.convert.search_results import searched_rows

    renderer = renderer_for(json, quiet, verbose)
    result = compare(
        model,
        budget,
        data,
        options,
        tokens=data_tokens,
        only=method,
        further=searched_rows(searched),
        out=out,
        track=renderer.track,
    )
    renderer.result("compare", result, *compare_tables(result))
