"""The command line: parse, call, render. No logic, and nothing heavy is imported before a command runs."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional, get_args

import typer

from moeify.errors import CheckError, MoeifyError, UsageError
from moeify.finetune_options import FinetuneOptions, Precision, Schedule, Stage
from moeify.options import DType, Fusion, RefitTo, SplitOptions, Style
from moeify.version import __version__

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
KINDS = "families targets partitions routers strategies recipes"

Model = Annotated[str, typer.Argument(help="Folder, .gguf file, hub id or `builtin`.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no tables and no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own warnings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Out = Annotated[Optional[Path], typer.Option("--out", "-o", help="Where to write.", show_default=False)]  # noqa: UP045
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result once the new one is complete.")]
Device = Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, cuda:1.")]
Seed = Annotated[int, typer.Option(help="Of sampling, clustering and projections.")]
Dtype = Annotated[DType, typer.Option(help="Of the weights; auto keeps the checkpoint's.")]
Calibration = Annotated[
    list[str],
    typer.Option(
        help="Text, jsonl or parquet file, folder, hub data set, builtin, or self (text the model samples); "
        "repeat it for a mixture."
    ),
]
StageNames = Annotated[list[str], typer.Option(help="layers, router, lora or full; repeat it, in order.")]
RefitToOption = Annotated[
    RefitTo, typer.Option(help="What the refit restores: the FFN's output or the dense residual stream.")
]
Context = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Tokens in a block of text; 512, or as many as the model takes.", show_default=False),
]


def main() -> None:
    """Entry point: runs the command and turns every outcome into an exit code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit code: 0, 1 bug, 2 usage, 3 input, 4 check failed, 130 interrupted."""
    from moeify.render import Renderer, traceback_of

    try:
        code = app(args=arguments, standalone_mode=False)
    except MoeifyError as error:
        if "--debug" in arguments:
            traceback_of(error)
        Renderer().error(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except typer.Exit as error:
        return int(error.exit_code)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            # The option parser's own errors print themselves with the usage line.
            error.show()
            return 2
        if "--debug" in arguments:
            traceback_of(error)
        Renderer().error(RuntimeError(f"{type(error).__name__}: {error} (a bug in moeify; --debug shows where)"))
        return 1
    return code if isinstance(code, int) else 0


def _renderer(as_json: bool, quiet: bool, verbose: bool, *, loads_models: bool = True) -> Any:
    from moeify.render import Renderer

    if loads_models and not verbose:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return Renderer(as_json=as_json, quiet=quiet)


def _layers(text: str) -> tuple[int, ...]:
    """Layer numbers from a comma-separated list."""
    try:
        return tuple(sorted({int(number) for number in text.split(",") if number.strip()}))
    except ValueError as error:
        raise UsageError(f"--dense-layers {text} is no list of layers", "write --dense-layers 0,1,29") from error


def _stages(names: list[str]) -> tuple[Stage, ...]:
    known: tuple[Stage, ...] = get_args(Stage)
    for name in names:
        if name not in known:
            raise UsageError(f"there is no stage {name}", f"--stage takes {', '.join(known)}; repeat it for several")
    return tuple(stage for name in names for stage in known if stage == name)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"moeify {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads."""


@app.command("inspect")
def inspect_command(
    model: Model,
    experts: Annotated[int, typer.Option(help="Experts the estimates are made for.")] = DEFAULTS.experts,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Say what a model is, how it can be split, which targets hold it, and what that takes."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.inspect import inspect
    from moeify.render import inspect_tables

    found = inspect(model, experts=experts, track=renderer.track)
    step = f"moeify split {model} --experts {found.experts}"
    renderer.result("inspect", found, *inspect_tables(found), next_step=step)


@app.command("split")
def split_command(
    model: Model,
    experts: Annotated[int, typer.Option(help="Equal slices of each FFN.")] = DEFAULTS.experts,
    shared: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Slices that are always on; about half of the active ones.", show_default=False),
    ] = None,
    active: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Slices that run for a token, shared ones included; 3/4 of all.", show_default=False),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Prune instead: a smaller dense model.")] = False,
    partition: Annotated[str, typer.Option(help="How neurons are grouped: moeify ls partitions.")] = DEFAULTS.partition,
    router: Annotated[str, typer.Option(help="How experts are chosen: moeify ls routers.")] = DEFAULTS.router,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Share of all FFN parameters active per token, spent where it counts.", show_default=False),
    ] = None,
    dense_layers: Annotated[
        str, typer.Option(help="Layers whose FFN stays whole, such as 0,1,29.", show_default=False)
    ] = "",
    gate: Annotated[
        Style, typer.Option(help="Weights of the chosen experts: hard (all one), softmax, or soft (all experts).")
    ] = DEFAULTS.gate,
    temperature: Annotated[float, typer.Option(help="Of the softmax.")] = DEFAULTS.temperature,
    fusion: Annotated[
        Fusion, typer.Option(help="Weights add up to the number of chosen experts (sum) or to one (mean).")
    ] = DEFAULTS.fusion,
    refit: Annotated[bool, typer.Option(help="Fit down_proj in closed form.")] = DEFAULTS.refit,
    refit_to: RefitToOption = DEFAULTS.refit_to,
    target: Annotated[str, typer.Option(help="MoE architecture to write: moeify ls targets.")] = DEFAULTS.target,
    calibration: Calibration = list(DEFAULTS.calibration),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = DEFAULTS.tokens,
    context: Context = None,
    seed: Seed = DEFAULTS.seed,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    plan: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Use the partition and routers of a saved plan again.", show_default=False),
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    report: Annotated[bool, typer.Option("--report", help="Show what was measured in every layer.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan and estimates, write nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Cut every FFN into experts and write a native mixture-of-experts checkpoint."""
    options = SplitOptions(
        experts=experts,
        shared=shared,
        active=active,
        static=static,
        budget=budget,
        dense_layers=_layers(dense_layers),
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
    from moeify.render import layers_table, preview_table, split_table
    from moeify.split import split

    if dry_run:
        planned = preview(model, options, track=renderer.track)
        renderer.result("preview", planned, preview_table(planned), next_step="the same without --dry-run")
        return
    where = out or Path(f"{Path(model).name}-{'static' if static else 'moe'}")
    result = split(model, where, options, overwrite=overwrite, track=renderer.track)
    step = f"moeify {'eval ' + model + ' ' + str(where) if static else f'verify {where} --dense {model}'}"
    tables = (split_table(result), *((layers_table(result.plan),) if report else ()))
    renderer.result("split", result, *tables, next_step=step)


@app.command("search")
def search_command(
    model: Model,
    budget: Annotated[float, typer.Option(help="Share of all FFN parameters active per token.")] = 0.75,
    experts: Annotated[int, typer.Option(help="Equal slices of each FFN that is cut.")] = 32,
    strategy: Annotated[str, typer.Option(help="How layers are chosen: moeify ls strategies.")] = "greedy",
    trials: Annotated[int, typer.Option(help="Whole choices that a strategy may measure.")] = 32,
    partition: Annotated[str, typer.Option(help="moeify ls partitions.")] = DEFAULTS.partition,
    router: Annotated[str, typer.Option(help="moeify ls routers.")] = DEFAULTS.router,
    calibration: Calibration = list(DEFAULTS.calibration),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Calibration tokens; a search uses 8,192 of them.")] = DEFAULTS.tokens,
    context: Context = None,
    seed: Seed = DEFAULTS.seed,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="FILE.json; the frontier is drawn beside it as FILE.svg.", show_default=False),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
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
    from moeify.render import search_tables
    from moeify.search import search

    if out is not None:
        check_drawable(out)
    result = search(
        model, budget, options, strategy=strategy, trials=trials, track=renderer.track, announce=renderer.announce
    )
    if out is not None:
        write_frontier(result, out)
    layout = result.found.layout
    step = f"moeify split {model} --experts {layout.num_experts} --active {layout.num_active}"
    step += f" --dense-layers {','.join(map(str, layout.dense_layers))}" if layout.dense_layers else ""
    renderer.result("search", {**vars(result), "options": result.options}, *search_tables(result), next_step=step)


@app.command("compare")
def compare_command(
    model: Model,
    experts: Annotated[int, typer.Option(help="Equal slices of each FFN.")] = DEFAULTS.experts,
    budget: Annotated[list[float], typer.Option(help="Share of the FFN active per token; repeat it.")] = [0.75],  # noqa: B006
    data: Annotated[list[str], typer.Option(help="Evaluation text; repeat it.")] = ["builtin-heldout"],  # noqa: B006
    data_tokens: Annotated[int, typer.Option(help="At most so many tokens of each text.")] = 10_240,
    method: Annotated[
        list[str], typer.Option(help="Only these rows, and static + refit; repeat it.", show_default=False)
    ] = [],  # noqa: B006
    searched: Annotated[
        list[Path], typer.Option(help="Results of `moeify search -o FILE.json` as further rows.", show_default=False)
    ] = [],  # noqa: B006
    refit_to: RefitToOption = DEFAULTS.refit_to,
    calibration: Calibration = list(DEFAULTS.calibration),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = DEFAULTS.tokens,
    context: Context = None,
    seed: Seed = DEFAULTS.seed,
    device: Device = DEFAULTS.device,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="FILE.json; a run that was stopped goes on from it.", show_default=False),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
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
    from moeify.render import compare_table

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
    renderer.result("compare", result, compare_table(result))


@app.command("finetune")
def finetune_command(
    moe: Annotated[str, typer.Argument(help="What `moeify split` wrote, or a dense model.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="The dense model it shall follow.", show_default=False)],
    data: Annotated[
        list[str], typer.Option(help="Training text, as for --calibration; repeat it for a mixture.")
    ] = list(TRAINING.data),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Training tokens; every stage sees the same.")] = TRAINING.tokens,
    stage: StageNames = list(TRAINING.stage),  # noqa: B006
    epochs: Annotated[int, typer.Option(help="How often router, lora and full see the text.")] = TRAINING.epochs,
    layer_tokens: Annotated[
        int, typer.Option(help="At most so many of the tokens for layers.")
    ] = TRAINING.layer_tokens,
    context: Context = None,
    batch: Annotated[int, typer.Option(help="Blocks at once, on each process.")] = TRAINING.batch,
    accumulate: Annotated[int, typer.Option(help="Batches that make one step.")] = TRAINING.accumulate,
    learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of all but routers; 1e-4 for full, 1e-3 for lora.", show_default=False),
    ] = None,
    router_rate: Annotated[float, typer.Option(help="Of routers, relative to their weights.")] = TRAINING.router_rate,
    schedule: Annotated[Schedule, typer.Option(help="How rates fall.")] = TRAINING.schedule,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which rates rise.")] = TRAINING.warmup,
    weight_decay: Annotated[float, typer.Option(help="Of matrices that are not routers.")] = TRAINING.weight_decay,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the teacher.")] = TRAINING.kl,
    lm: Annotated[float, typer.Option(help="Weight of the language modelling loss.")] = TRAINING.lm,
    hidden: Annotated[float, typer.Option(help="Weight of the error of every layer's output.")] = TRAINING.hidden,
    balance: Annotated[float, typer.Option(help="Weight of an even load.")] = TRAINING.balance,
    z_loss: Annotated[float, typer.Option(help="Weight of small router scores.")] = TRAINING.z_loss,
    lora_rank: Annotated[int, typer.Option(help="Rank of the updates of lora.")] = TRAINING.lora_rank,
    precision: Annotated[Precision, typer.Option(help="Of the arithmetic.")] = TRAINING.precision,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, a third more time.")] = False,
    cache_teacher: Annotated[
        bool, typer.Option("--cache-teacher", help="Keep the teacher's hidden states on disk.")
    ] = False,
    eval_data: Annotated[list[str], typer.Option(help="Held-out text; repeat it.")] = list(TRAINING.eval_data),  # noqa: B006
    eval_tokens: Annotated[int, typer.Option(help="At most so many tokens of each.")] = TRAINING.eval_tokens,
    every: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Steps between evaluations, each with a checkpoint; a tenth of all.", show_default=False),
    ] = None,
    patience: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Stop after so many evaluations without progress, and take the best.", show_default=False),
    ] = None,
    seed: Seed = TRAINING.seed,
    device: Device = TRAINING.device,
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Train a converted or pruned checkpoint to do what the dense model does; resumes where it was stopped."""
    options = FinetuneOptions(
        stage=_stages(stage),
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
    from moeify.render import finetune_table

    where = out or Path(f"{Path(moe).name}-finetuned")
    result = finetune(moe, teacher, where, options, overwrite=overwrite, track=renderer.track)
    renderer.result("finetune", result, finetune_table(result), next_step=f"moeify eval {teacher} {moe} {where}")


@app.command("verify")
def verify_command(
    moe: Annotated[str, typer.Argument(help="The converted checkpoint.", show_default=False)],
    dense: Annotated[str, typer.Option(help="The model it came from.", show_default=False)],
    tolerance: Annotated[float, typer.Option(help="Largest logit difference in float32, all experts on.")] = 1e-4,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Prove that a checkpoint is the dense model, cut: every key, every neuron, and with all experts on every logit."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.render import verify_table
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
    models: Annotated[list[str], typer.Argument(help="Checkpoints, the reference first.", show_default=False)],
    data: Annotated[list[str], typer.Option(help="Text source; repeat it for several.")] = ["builtin-heldout"],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="At most so many tokens of each text.")] = 8192,
    context: Context = None,
    stride: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Tokens the window moves by; half the context.", show_default=False),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Measure perplexity and speed of one or several models on the same text."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.evaluate import evaluate
    from moeify.render import eval_table

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


@app.command("run")
def run_recipe_command(
    recipe: Annotated[str, typer.Argument(help="YAML file or name (moeify ls recipes).", show_default=False)],
    set_: Annotated[
        list[str], typer.Option("--set", help="Override a key: split.experts=16; repeat it.", show_default=False)
    ] = [],  # noqa: B006
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Run a recipe: split, controls, verify, eval, gates. Finished stages are skipped."""
    renderer = _renderer(json, quiet, verbose)
    from moeify.recipe import find_recipe, load_recipe, run
    from moeify.render import run_tables

    overrides = [*set_, *([f"out={out}"] if out else [])]
    result = run(load_recipe(find_recipe(recipe), overrides), track=renderer.track)
    renderer.result("run", {"passed": result.passed, **vars(result)}, *run_tables(result))
    if not result.passed:
        failed = [gate.name for gate in result.gates if not gate.passed]
        raise CheckError(f"gates failed: {', '.join(failed)}", f"see {result.out / 'run.json'}")


@app.command("ls")
def list_command(
    kind: Annotated[str, typer.Argument(help=f"One of: {KINDS}.", show_default=False)],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """List families, targets, partitions, routers, strategies or recipes."""
    renderer = _renderer(json, quiet, verbose, loads_models=False)
    from moeify.listing import entries
    from moeify.render import list_table

    found = entries(kind)
    renderer.result("ls", {"kind": kind, "entries": dict(found)}, list_table(kind, found))


if __name__ == "__main__":
    main()
