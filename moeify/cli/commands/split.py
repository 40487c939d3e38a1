"""`moeify split`: dense in, mixture of experts out."""

from pathlib import Path

from moeify.cli import options as option
from moeify.options import SplitOptions

DEFAULTS = SplitOptions()


def split_command(
    model: option.Model,
    experts: option.Experts = DEFAULTS.experts,
    shared: option.Shared = None,
    active: option.Active = None,
    static: option.Static = False,
    partition: option.Partition = DEFAULTS.partition,
    router: option.Router = DEFAULTS.router,
    budget: option.SplitBudget = None,
    dense_layers: option.DenseLayers = "",
    mixing: option.Mixing = DEFAULTS.mixing,
    temperature: option.Temperature = DEFAULTS.temperature,
    fusion: option.Fusion = DEFAULTS.fusion,
    refit: option.Refit = DEFAULTS.refit,
    refit_to: option.RefitTo = DEFAULTS.refit_to,
    target: option.Target = DEFAULTS.target,
    calibration: option.Calibration = list(DEFAULTS.calibration),  # noqa: B006
    tokens: option.Tokens = DEFAULTS.tokens,
    context: option.Context = None,
    seed: option.Seed = DEFAULTS.seed,
    dtype: option.Dtype = DEFAULTS.dtype,
    device: option.Device = DEFAULTS.device,
    plan: option.Plan = None,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    report: option.Report = False,
    dry_run: option.DryRun = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Cut every FFN into experts and write a native mixture-of-experts checkpoint."""
    options = SplitOptions(
        experts=experts,
        shared=shared,
        active=active,
        static=static,
        budget=budget,
        dense_layers=option.layers(dense_layers),
        partition=partition,
        router=router,
        mixing=mixing,
        temperature=temperature,
        fusion=fusion,
        refit=refit,
        refit_to=refit_to,
        target=target,
        calibration=tuple(calibration),
        tokens=tokens,
        context=context,
        seed=seed,
        dtype=dtype,
        device=device,
        plan=plan,
    )
    from moeify.cli.render import renderer_for
    from moeify.cli.tables.split import layers_table, preview_table, split_table
    from moeify.convert.pipeline import split
    from moeify.convert.prepare import preview

    renderer = renderer_for(json, quiet, verbose)
    if dry_run:
        planned = preview(model, options, track=renderer.track)
        renderer.result("preview", planned, preview_table(planned), next_step="the same without --dry-run")
        return
    where = out or Path(f"{Path(model).name}-{'static' if static else 'moe'}")
    result = split(model, where, options, overwrite=overwrite, track=renderer.track, announce=renderer.announce)
    step = f"moeify {'eval ' + model + ' ' + str(where) if static else f'verify {where} --dense {model}'}"
    tables = (split_table(result), *((layers_table(result.plan),) if report else ()))
    renderer.result("split", result, *tables, next_step=step)
