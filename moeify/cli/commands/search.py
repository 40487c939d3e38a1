"""`moeify search`: what to cut under a budget."""

from moeify.cli import options as option
from moeify.options import SplitOptions

DEFAULTS = SplitOptions()


def search_command(
    model: option.Model,
    budget: option.Budget = 0.75,
    experts: option.Experts = DEFAULTS.experts,
    strategy: option.Strategy = "greedy",
    trials: option.Trials = 32,
    partition: option.Partition = DEFAULTS.partition,
    router: option.Router = DEFAULTS.router,
    calibration: option.Calibration = list(DEFAULTS.calibration),  # noqa: B006
    tokens: option.SearchTokens = DEFAULTS.tokens,
    context: option.Context = None,
    seed: option.Seed = DEFAULTS.seed,
    dtype: option.Dtype = DEFAULTS.dtype,
    device: option.Device = DEFAULTS.device,
    out: option.SearchOut = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Choose under a budget which layers stay dense and how the others are cut; resumes where it was stopped."""
    options = SplitOptions(
        experts=experts,
        partition=partition,
        router=router,
        calibration=tuple(calibration),
        tokens=tokens,
        context=context,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.search import search_tables
    from moeify.convert.search import search
    from moeify.convert.search_results import check_drawable, write_frontier

    renderer = renderer_for(json, quiet, verbose)
    if out is not None:
        check_drawable(out)
    result = search(
        model, budget, options, strategy=strategy, trials=trials, track=renderer.track, announce=renderer.announce
    )
    if out is not None:
        write_frontier(result, out)
    layout = result.choice.layout
    step = f"moeify split {model} --experts {layout.num_experts} --active {layout.num_active}"
    step += f" --shared {layout.num_shared} --partition {partition} --router {router} --tokens {tokens}"
    step += f" --dense-layers {','.join(map(str, layout.dense_layers))}" if layout.dense_layers else ""
    step += "".join(f" --calibration {source}" for source in calibration)
    renderer.result("search", {**vars(result), "options": result.options}, *search_tables(result), next_step=step)
