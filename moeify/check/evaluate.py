"""How well one or several models do their job, side by side on the same data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeify.check.calibrated import calibrated_on, warn_of_kind
from moeify.check.loops import LoopResult, Loops
from moeify.check.measures import open_measure
from moeify.check.perplexity import EvalResult
from moeify.check.scores import Score
from moeify.check.tasks import Tasks
from moeify.check.tasks_results import TaskResult
from moeify.command_line import names_of
from moeify.data.images import DIGITS
from moeify.errors import InputError
from moeify.kernels import register
from moeify.models import stock
from moeify.models.config import load_config
from moeify.models.device import find_device
from moeify.models.files import locate
from moeify.models.heads import LANGUAGE_MODELS, auto_name, modality_of
from moeify.options import DType, EvalOptions, Names, Track
from moeify.progress import shown
from moeify.readable import Readable, Rows
from moeify.words import listing


@dataclass(frozen=True, repr=False)
class Evaluation(Readable):
    """All models on all texts and tasks, in the order they were measured; loops of those with a chat template.

    Args:
        results: perplexities.
        tasks: questions and labelled sets.
        loops: how answers end.
        scores: by other measures, of models that no perplexity is of.
    """

    results: tuple[EvalResult, ...]
    tasks: tuple[TaskResult, ...] = ()
    loops: tuple[LoopResult, ...] = ()
    scores: tuple[Score, ...] = ()


def load(model: str | Path, *, dtype: str = "auto", device: str = "cpu", **arguments: Any) -> Any:
    """Load a dense or converted checkpoint with stock transformers, ready for inference.

    On CUDA devices and CPUs its experts run on moeify's kernels, unless `experts_implementation` says otherwise.

    Args:
        model: a folder, a .gguf file, a hub id or `builtin`.
        dtype: `auto` keeps the checkpoint's.
        device: where to put it; auto is cuda if there is one.
        arguments: passed on to `from_pretrained`.

    Raises:
        UsageError: there is no such device here, or no such dtype.
        InputError: the model cannot be read.

    Example:
        model = moeify.load("my-moe")
        print(model(input_ids).logits.shape)
    """
    EvalOptions(dtype=dtype)  # type: ignore[arg-type]
    place = find_device(device)
    loaded: Any = stock.load(locate(str(model), shown), dtype=dtype, **arguments)
    loaded = loaded.to(place).eval()
    chosen = "experts_implementation" in arguments or not loaded._can_set_experts_implementation()
    if loaded.device.type in ("cuda", "cpu") and not chosen:
        register()
        loaded.set_experts_implementation("moeify")
    return loaded


def evaluate(
    models: Names,
    data: Names = EvalOptions.data,
    *,
    tokens: int = EvalOptions.tokens,
    context: int | None = EvalOptions.context,
    stride: int | None = EvalOptions.stride,
    dtype: DType = EvalOptions.dtype,
    device: str = EvalOptions.device,
    track: Track[Any] = shown,
) -> Rows[Any]:
    """Measure each model on each text: an EvalResult of each, or a Score of a model that no perplexity is of.

    Args:
        models: checkpoints; the first is what the others are compared with.
        data: text sources.
        tokens: at most so many tokens of each text.
        context: tokens in a window; None means 512 or as many as all models take.
        stride: tokens the window moves by, each scored once with at least context - stride tokens before it (but for
            the first window); None means a window: blocks that do not overlap, as `bench` and `compare` have them.
        dtype: of the weights; `auto` keeps the checkpoint's.
        device: where it runs.
        track: wraps the loop over windows.

    Raises:
        InputError: a model or text cannot be read, or two models cut the text into different tokens.

    Example:
        dense, moe = moeify.evaluate(["builtin", "my-moe"], "builtin-heldout")
        print(moe.perplexity / dense.perplexity)
    """
    options = EvalOptions(
        names_of(data), tokens=tokens, context=context, stride=stride, dtype=dtype, device=device, answers=0
    )
    evaluation = measure(names_of(models), options, track=track)
    return Rows[Any]([*evaluation.results, *evaluation.scores])


def suited(options: EvalOptions, configs: Sequence[Any]) -> EvalOptions:
    """The options with data of the models' kind where nobody said which.

    Raises:
        InputError: models of several kinds.
    """
    kinds = {modality_of(config) for config in configs}
    if len(kinds) > 1:
        raise InputError(
            f"models of {listing(sorted(kinds))} stand side by side, expected models that take the same",
            "measure each kind by a call of its own",
        )
    if kinds != {"image"} or options.data != EvalOptions.data:
        return options
    names = [set((config.id2label or {}).values()) for config in configs]
    tasks = (DIGITS[0],) if not options.tasks and all({*map(str, range(10))} == one for one in names) else options.tasks
    return replace(options, data=(DIGITS[1],), tasks=tasks)


def measure(models: Sequence[str], options: EvalOptions, *, track: Track[Any] = shown) -> Evaluation:
    """Measure each model on each text, and have it answer each task; models for chats answer some questions.

    Args:
        models: checkpoints; the first is what the others are compared with.
        options: texts, tasks and how they are measured.
        track: wraps the loops over windows and questions.

    Raises:
        UsageError: an unknown task, or one that needs a package that is missing.
        InputError: a model, text or task cannot be read, or two models cut a text into different tokens.
    """
    paths = {model: locate(model, track) for model in models}
    options = suited(options, [load_config(path) for path in paths.values()])
    find_device(options.device)
    measured = open_measure(paths, options)
    tasks = Tasks(options.tasks, options.questions, track, context=options.context)
    speaks = all(auto_name(load_config(path)) in LANGUAGE_MODELS for path in paths.values())
    loops = Loops(paths, options.answers if speaks else 0)
    own = {name: calibrated_on(path) for name, path in paths.items()}
    warn_of_kind(own, options.data)
    results = []
    for name in models:
        model = load(name, dtype=options.dtype, device=options.device)
        rows = [measured(model, name, source, track) for source in options.data]
        results += [replace(row, calibrated_on=own[name]) for row in rows]
        tasks.ask(model, name, paths[name], track)
        loops.ask(model, name, track)
        del model
    return Evaluation(
        tuple(row for row in results if isinstance(row, EvalResult)),
        tasks.results(),
        loops.results(),
        tuple(row for row in results if isinstance(row, Score)),
    )
