"""The command line: parse, call, render. No logic, and nothing heavy is imported before a command runs."""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from moeify import cli_options as option
from moeify.errors import CheckError, MoeifyError, UsageError
from moeify.options import SplitOptions
from moeify.training.options import FinetuneOptions

app = typer.Typer(
    name="moeify",
    help="Turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULTS = SplitOptions()
TRAINING = FinetuneOptions()


def main() -> None:
    """Entry point: runs the command and turns every outcome into an exit code."""
    interrupts: list[object] = []

    def interrupt(*signal_and_frame: object) -> NoReturn:
        interrupts.append(signal_and_frame)
        raise KeyboardInterrupt

    # A parent that has the signal ignored, as shells do for background jobs, keeps it so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    sys.exit(run_command(sys.argv[1:], interrupted=lambda: bool(interrupts)))


def run_command(arguments: list[str], *, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Run one command line and return its exit code: 0, 1 bug, 2 usage, 3 input, 4 check failed, 130 interrupted.

    Args:
        arguments: what stands behind the program's name.
        interrupted: whether Ctrl-C was pressed. Compiled code that is interrupted may replace KeyboardInterrupt by an
            error of its own.
    """
    try:
        code = app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except typer.Exit as error:
        return int(error.exit_code)
    except Exception as error:
        return 130 if interrupted() else _report(error, debug="--debug" in arguments)
    return code if isinstance(code, int) else 0


def _report(error: Exception, *, debug: bool) -> int:
    """Show an error and return its exit code."""
    from moeify.render import Renderer, traceback_of

    if hasattr(error, "show") and hasattr(error, "exit_code"):
        # The option parser's own errors print themselves with the usage line.
        error.show()
        return 2
    if debug:
        traceback_of(error)
    if isinstance(error, MoeifyError):
        Renderer().error(error)
        return error.exit_code
    Renderer().error(RuntimeError(f"{type(error).__name__}: {error} (a bug in moeify; --debug shows where)"))
    return 1


def _renderer(as_json: bool, quiet: bool, verbose: bool, *, loads_models: bool = True) -> Any:
    from moeify.render import Renderer

    if loads_models and not verbose:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return Renderer(as_json=as_json, quiet=quiet)


@app.callback()
def root(
    version: option.Version = False,
) -> None:
    """Turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads."""


@app.command("inspect")
def inspect_command(
    model: option.Model,
    experts: Annotated[int, typer.Option(help="Experts the estimates are made for.")] = DEFAULTS.experts,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Say what a model is, how it can be split, which targets hold it, and what that takes."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.inspect import inspect
    from moeify.tables import inspect_tables

    found = inspect(model, experts=experts, track=renderer.track)
    step = f"moeify split {model} --experts {found.experts}"
    renderer.result("inspect", found, *inspect_tables(found), next_step=step)


@app.command("split")
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
    gate: option.Gate = DEFAULTS.gate,
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
        gate=gate,
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
    renderer = _renderer(json, quiet, verbose)
    from moeify.prepare import preview
    from moeify.split import split
    from moeify.tables import layers_table, preview_table, split_table

    if dry_run:
        planned = preview(model, options, track=renderer.track)
        renderer.result("preview", planned, preview_table(planned), next_step="the same without --dry-run")
        return
    where = out or Path(f"{Path(model).name}-{'static' if static else 'moe'}")
    result = split(model, where, options, overwrite=overwrite, track=renderer.track, announce=renderer.announce)
    step = f"moeify {'eval ' + model + ' ' + str(where) if static else f'verify {where} --dense {model}'}"
    tables = (split_table(result), *((layers_table(result.plan),) if report else ()))
    renderer.result("split", result, *tables, next_step=step)


@app.command("search")
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
    renderer = _renderer(json, quiet, verbose)
    from moeify.frontier import check_drawable, write_frontier
    from moeify.search import search
    from moeify.tables import search_tables

    if out is not None:
        check_drawable(out)
    result = search(
        model, budget, options, strategy=strategy, trials=trials, track=renderer.track, announce=renderer.announce
    )
    if out is not None:
        write_frontier(result, out)
    layout = result.found.layout
    step = f"moeify split {model} --experts {layout.num_experts} --active {layout.num_active}"
    step += f" --shared {layout.num_shared} --partition {partition} --router {router} --tokens {tokens}"
    step += f" --dense-layers {','.join(map(str, layout.dense_layers))}" if layout.dense_layers else ""
    step += "".join(f" --calibration {source}" for source in calibration)
    renderer.result("search", {**vars(result), "options": result.options}, *search_tables(result), next_step=step)


@app.command("compare")
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
    renderer = _renderer(json, quiet, verbose)
    from moeify.compare import compare
    from moeify.frontier import searched_rows
    from moeify.tables import compare_tables

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


@app.command("finetune")
def finetune_command(
    moe: option.Student,
    teacher: option.Teacher,
    data: option.Data = list(TRAINING.data),  # noqa: B006
    tokens: option.TrainingTokens = TRAINING.tokens,
    stage: option.Stages = list(TRAINING.stage),  # noqa: B006
    epochs: option.Epochs = TRAINING.epochs,
    layer_tokens: option.LayerTokens = TRAINING.layer_tokens,
    context: option.Context = None,
    batch: option.Batch = TRAINING.batch,
    accumulate: option.Accumulate = TRAINING.accumulate,
    learning_rate: option.LearningRate = None,
    router_rate: option.RouterRate = TRAINING.router_rate,
    schedule: option.Schedule = TRAINING.schedule,
    warmup: option.Warmup = TRAINING.warmup,
    weight_decay: option.WeightDecay = TRAINING.weight_decay,
    kl: option.KL = TRAINING.kl,
    lm: option.LM = TRAINING.lm,
    hidden: option.HiddenWeight = TRAINING.hidden,
    balance: option.Balance = TRAINING.balance,
    z_loss: option.ZLoss = TRAINING.z_loss,
    explore: option.Explore = TRAINING.explore,
    lora_rank: option.LoraRank = TRAINING.lora_rank,
    precision: option.TrainingPrecision = TRAINING.precision,
    checkpointing: option.Checkpointing = False,
    cache_teacher: option.CacheTeacher = False,
    eval_data: option.EvalData = list(TRAINING.eval_data),  # noqa: B006
    eval_tokens: option.EvalTokens = TRAINING.eval_tokens,
    every: option.Every = None,
    patience: option.Patience = None,
    seed: option.Seed = TRAINING.seed,
    device: option.Device = TRAINING.device,
    out: option.Out = None,
    overwrite: option.Overwrite = False,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Train a converted or pruned checkpoint to do what the dense model does; resumes where it was stopped."""
    options = FinetuneOptions(
        stage=option.stages(stage),
        data=tuple(data),
        tokens=tokens,
        epochs=epochs,
        layer_tokens=layer_tokens,
        context=context,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        router_rate=router_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        kl=kl,
        lm=lm,
        hidden=hidden,
        balance=balance,
        z_loss=z_loss,
        explore=explore,
        lora_rank=lora_rank,
        precision=precision,
        checkpointing=checkpointing,
        cache_teacher=cache_teacher,
        eval_data=tuple(eval_data),
        eval_tokens=eval_tokens,
        every=every,
        patience=patience,
        seed=seed,
        device=device,
    )
    # Of several processes the first one speaks.
    alone = int(os.environ.get("RANK", "0")) == 0
    renderer = _renderer(json and alone, quiet or not alone, verbose)
    from moeify.finetune import finetune
    from moeify.tables import finetune_table

    where = out or Path(f"{Path(moe).name}-finetuned")
    result = finetune(moe, teacher, where, options, overwrite=overwrite, track=renderer.track)
    renderer.result("finetune", result, finetune_table(result), next_step=f"moeify eval {teacher} {moe} {where}")


@app.command("verify")
def verify_command(
    moe: option.Moe,
    dense: option.DenseModel,
    tolerance: option.Tolerance = 1e-4,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Prove that a checkpoint is the dense model, cut: every key, every neuron, and with all experts on every logit."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.tables import verify_table
    from moeify.verify import verify

    report = verify(moe, dense, tolerance=tolerance, track=renderer.track)
    renderer.result(
        "verify",
        {"passed": report.passed, **vars(report)},
        verify_table(report),
        next_step=f"moeify eval {dense} {moe}" if report.passed else "",
    )
    if not report.passed:
        failed = [check.name for check in report.checks if not check.passed]
        raise CheckError(f"{moe} is not {dense}, cut: {', '.join(failed)}", "split it again")


@app.command("eval")
def eval_command(
    models: option.Models,
    data: option.Data = ["builtin-heldout"],  # noqa: B006
    tokens: option.DataTokens = 8192,
    context: option.Context = None,
    stride: option.Stride = None,
    dtype: option.Dtype = "auto",
    device: option.Device = "cpu",
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Measure perplexity and speed of one or several models on the same text."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.evaluate import evaluate
    from moeify.tables import eval_table

    results = evaluate(
        models,
        data,
        tokens=tokens,
        context=context,
        stride=stride,
        dtype=dtype,
        device=device,
        track=renderer.track,
    )
    renderer.result("eval", {"results": results}, eval_table(results))


@app.command("tune")
def tune_command(
    model: option.Moe,
    tokens: option.CallTokens = [1, 8, 32, 64, 128, 512, 2048, 8192],  # noqa: B006
    device: option.Device = "cuda",
    backward: option.Backward = True,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Find the fastest kernel launches for a model's experts on this GPU, and keep them."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.tables import tune_table
    from moeify.tune import tune_model

    result = tune_model(model, tokens, device=device, backward=backward, track=renderer.track)
    renderer.result("tune", result, tune_table(result))


@app.command("bench")
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
    renderer = _renderer(json, quiet, verbose)
    from moeify.layer_bench import ask, layer_bench
    from moeify.tables import layer_bench_tables

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


@app.command("run")
def run_recipe_command(
    recipe: option.Recipe,
    set_: option.Overrides = [],  # noqa: B006
    out: option.Out = None,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """Run a recipe: split, controls, verify, eval, gates. Finished stages are skipped."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.recipe import find_recipe, load_recipe, run
    from moeify.tables import run_tables

    overrides = [*set_, *([f"out={out}"] if out else [])]
    result = run(load_recipe(find_recipe(recipe), overrides), track=renderer.track)
    renderer.result("run", {"passed": result.passed, **vars(result)}, *run_tables(result))
    if not result.passed:
        failed = [gate.name for gate in result.gates if not gate.passed]
        raise CheckError(f"gates failed: {', '.join(failed)}", f"see {result.out / 'run.json'}")


@app.command("ls")
def list_command(
    kind: option.Kind,
    json: option.Json = False,
    quiet: option.Quiet = False,
    verbose: option.Verbose = False,
    debug: option.Debug = False,  # noqa: ARG001
) -> None:
    """List families, targets, partitions, routers, strategies or recipes."""
    renderer = _renderer(json, quiet, verbose, loads_models=False)
    from moeify.listing import entries
    from moeify.tables import list_table

    found = entries(kind)
    renderer.result("ls", {"kind": kind, "entries": dict(found)}, list_table(kind, found))


if __name__ == "__main__":
    main()
