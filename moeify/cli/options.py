"""Arguments and options of the command line: how each is spelled and what its help says. Commands add the defaults."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from moeify import options
from moeify.errors import UsageError
from moeify.training import options as training
from moeify.version import __version__

KINDS = "families targets partitions routers strategies recipes"


def layers(text: str) -> tuple[int, ...]:
    """Layer numbers from a comma-separated list.

    Raises:
        UsageError: something between the commas is no number.
    """
    try:
        return tuple(sorted({int(number) for number in text.split(",") if number.strip()}))
    except ValueError as error:
        raise UsageError(f"--dense-layers {text} is no list of layers", "write --dense-layers 0,1,29") from error


def stages(names: list[str]) -> tuple[training.Stage, ...]:
    """Stages by name, in the order they were named.

    Raises:
        UsageError: there is no such stage.
    """
    known: tuple[training.Stage, ...] = get_args(training.Stage)
    for name in names:
        if name not in known:
            raise UsageError(f"there is no stage {name}", f"--stage takes {', '.join(known)}; repeat it for several")
    return tuple(stage for name in names for stage in known if stage == name)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"moeify {__version__}")
        raise typer.Exit


# Every command.
Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no tables and no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own warnings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# What is read.
Model = Annotated[str, typer.Argument(help="Folder, .gguf file, hub id or `builtin`.", show_default=False)]
Models = Annotated[list[str], typer.Argument(help="Checkpoints, the reference first.", show_default=False)]
Moe = Annotated[str, typer.Argument(help="The converted checkpoint.", show_default=False)]
DenseModel = Annotated[str, typer.Option(help="The model it came from.", show_default=False)]
Recipe = Annotated[str, typer.Argument(help="YAML file or name (moeify ls recipes).", show_default=False)]
Kind = Annotated[str, typer.Argument(help=f"One of: {KINDS}.", show_default=False)]
SchemaName = Annotated[
    str, typer.Argument(help="What stands between `moeify.` and `/1` in a result.", show_default=False)
]
RunDir = Annotated[Path, typer.Argument(help="Folder with the results of moeify bench.", show_default=False)]
Plan = Annotated[
    str | None, typer.Option(help="Use the partition and routers of a saved plan again.", show_default=False)
]
Searched = Annotated[
    list[Path], typer.Option(help="Results of `moeify search -o FILE.json` as further rows.", show_default=False)
]

# Text.
Calibration = Annotated[
    list[str],
    typer.Option(
        help="Text, jsonl or parquet file, folder, hub data set, builtin, or self (text the model samples); "
        "repeat it for a mixture."
    ),
]
Tokens = Annotated[int, typer.Option(help="Calibration tokens.")]
SearchTokens = Annotated[int, typer.Option(help="Calibration tokens; a search uses 8,192 of them.")]
Context = Annotated[
    int | None, typer.Option(help="Tokens in a block of text; 512, or as many as the model takes.", show_default=False)
]
Data = Annotated[list[str], typer.Option(help="Text to evaluate on, or to train on; repeat it.")]
DataTokens = Annotated[int, typer.Option(help="At most so many tokens of each text.")]
BenchTokens = Annotated[
    str | None,
    typer.Option(
        "--tokens", help="At most so many of each text, 8192; with --layer those of a call: 1,512.", show_default=False
    ),
]
Stride = Annotated[int | None, typer.Option(help="Tokens the window moves by; half the context.", show_default=False)]
CallTokens = Annotated[
    list[int], typer.Option("--tokens", help="Tokens of a call, the most important last; repeat it.")
]
Backward = Annotated[bool, typer.Option(help="Tune the backward pass as well.")]

# Benchmarks of models.
Benched = Annotated[list[str], typer.Argument(help="Converted checkpoints.", show_default=False)]
Against = Annotated[
    list[str],
    typer.Option(help="The dense model they came from; repeat it for further ones.", show_default=False),
]
Batches = Annotated[str, typer.Option("--batch", help="Sequences at once, such as 1,8.")]
Prompts = Annotated[
    str, typer.Option("--prompt", help="Tokens of a prompt; 128,512 where all models take them.", show_default=False)
]
Implementations = Annotated[
    str,
    typer.Option("--implementation", help="Of experts, such as eager,grouped_mm; all that run.", show_default=False),
]
Roofline = Annotated[bool, typer.Option("--roofline", help="Measure the machine and compare times with it.")]
Baseline = Annotated[
    Path | None, typer.Option(help="An earlier bench.json; what is worse gives exit code 4.", show_default=False)
]
Threshold = Annotated[float, typer.Option(help="How many times worse than the baseline something may be.")]
Skip = Annotated[
    list[str], typer.Option(help="Leave out quality, speed, memory or experts; repeat it.", show_default=False)
]

# Layer benchmarks; lists are separated by commas, an empty one stands for all there are.
Layer = Annotated[bool, typer.Option("--layer", help="One layer on every implementation that is installed.")]
Cases = Annotated[str, typer.Option(help="Shapes, such as llama3-8b-8/2 or 64x256-8/2+2.")]
Routings = Annotated[str, typer.Option(help="How tokens choose experts: uniform, zipf.")]
Passes = Annotated[str, typer.Option(help="forward, training (forward and backward).")]
Peers = Annotated[str, typer.Option(help="Implementations, such as moeify,dense,grouped_mm.")]
SecondsPerRow = Annotated[
    float | None,
    typer.Option(help="How long an implementation is timed on a case; 2, with --layer 0.3.", show_default=False),
]
LimitSeconds = Annotated[
    float | None,
    typer.Option(help="Begin no case after that; the most important ones come first.", show_default=False),
]

# How FFNs are cut.
Experts = Annotated[int, typer.Option(help="Equal slices of each FFN that is cut.")]
Shared = Annotated[
    int | None, typer.Option(help="Slices that are always on; a quarter of the active ones.", show_default=False)
]
Active = Annotated[
    int | None,
    typer.Option(help="Slices that run for a token, shared ones included; 3/4 of all.", show_default=False),
]
Static = Annotated[bool, typer.Option("--static", help="Prune instead: a smaller dense model.")]
DenseLayers = Annotated[str, typer.Option(help="Layers whose FFN stays whole, such as 0,1,29.", show_default=False)]
Partition = Annotated[str, typer.Option(help="How neurons are grouped: moeify ls partitions.")]
Router = Annotated[str, typer.Option(help="How experts are chosen: moeify ls routers.")]
Mixing = Annotated[
    options.Style, typer.Option(help="Weights of the chosen experts: hard (all one), softmax, or soft (all experts).")
]
Temperature = Annotated[float, typer.Option(help="Of the softmax.")]
Fusion = Annotated[
    options.Fusion, typer.Option(help="Weights add up to the number of chosen experts (sum) or to one (mean).")
]
Refit = Annotated[bool, typer.Option(help="Fit down_proj in closed form.")]
RefitTo = Annotated[
    options.RefitTo, typer.Option(help="What the refit restores: the FFN's output or the dense residual stream.")
]
Target = Annotated[str, typer.Option(help="MoE architecture to write: moeify ls targets.")]

# Budgets, and what is compared.
Budget = Annotated[float, typer.Option(help="Share of all FFN parameters active per token.")]
SplitBudget = Annotated[
    float | None,
    typer.Option(help="Share of all FFN parameters active per token, spent where it counts.", show_default=False),
]
Budgets = Annotated[list[float], typer.Option(help="Share of the FFN active per token; repeat it.")]
Strategy = Annotated[str, typer.Option(help="How layers are chosen: moeify ls strategies.")]
Trials = Annotated[int, typer.Option(help="Whole choices that a strategy may measure.")]
Methods = Annotated[list[str], typer.Option(help="Only these rows, and static + refit; repeat it.", show_default=False)]
Tolerance = Annotated[float, typer.Option(help="Largest logit difference in float32, all experts on.")]

# Numbers and places.
Seed = Annotated[int, typer.Option(help="Of sampling, clustering and projections.")]
Dtype = Annotated[options.DType, typer.Option(help="Of the weights; auto keeps the checkpoint's.")]
Device = Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, cuda:1.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.", show_default=False)]
SearchOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="FILE.json; the frontier is drawn beside it as FILE.svg.", show_default=False),
]
CompareOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="FILE.json; a run that was stopped goes on from it.", show_default=False),
]
ReportOut = Annotated[
    Path | None, typer.Option("--out", "-o", help="FILE.html; RUN_DIR/report.html.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result once the new one is complete.")]
Report = Annotated[bool, typer.Option("--report", help="Show what was measured in every layer.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show plan and estimates, write nothing.")]
Overrides = Annotated[
    list[str], typer.Option("--set", help="Override a key: split.experts=16; repeat it.", show_default=False)
]

# Fine-tuning.
Stages = Annotated[list[str], typer.Option("--stage", help="layers, router, lora or full; repeat it, in order.")]
Student = Annotated[str, typer.Argument(help="What `moeify split` wrote, or a dense model.", show_default=False)]
Teacher = Annotated[str, typer.Option(help="The dense model it shall follow.", show_default=False)]
TrainingTokens = Annotated[int, typer.Option(help="Training tokens; every stage sees the same.")]
Epochs = Annotated[int, typer.Option(help="How often router, lora and full see the text.")]
LayerTokens = Annotated[int, typer.Option(help="At most so many of the tokens for layers.")]
Batch = Annotated[int, typer.Option(help="Blocks at once, on each process.")]
Accumulate = Annotated[int, typer.Option(help="Batches that make one step.")]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Of all but routers; 1e-4 for full, 1e-3 for lora.", show_default=False),
]
RouterRate = Annotated[float, typer.Option(help="Of routers, relative to their weights.")]
Schedule = Annotated[training.Schedule, typer.Option(help="How rates fall.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps in which rates rise.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices that are not routers.")]
KL = Annotated[float, typer.Option(help="Weight of the divergence from the teacher.")]
LM = Annotated[float, typer.Option(help="Weight of the language modelling loss.")]
HiddenWeight = Annotated[float, typer.Option(help="Weight of the error of every layer's output.")]
Balance = Annotated[float, typer.Option(help="Weight of an even load.")]
ZLoss = Annotated[float, typer.Option(help="Weight of small router scores.")]
Explore = Annotated[float, typer.Option(help="Noise by which routers find out what other choices are worth.")]
LoraRank = Annotated[int, typer.Option(help="Rank of the updates of lora.")]
TrainingPrecision = Annotated[training.Precision, typer.Option(help="Of the arithmetic.")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Less memory, a third more time.")]
CacheTeacher = Annotated[bool, typer.Option("--cache-teacher", help="Keep the teacher's hidden states on disk.")]
EvalData = Annotated[list[str], typer.Option(help="Held-out text; repeat it.")]
EvalTokens = Annotated[int, typer.Option(help="At most so many tokens of each.")]
Every = Annotated[
    int | None,
    typer.Option(help="Steps between evaluations, each with a checkpoint; a tenth of all.", show_default=False),
]
Patience = Annotated[
    int | None,
    typer.Option(help="Stop after so many evaluations without progress, and take the best.", show_default=False),
]
