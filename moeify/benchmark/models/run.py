"""The model benchmark: what a conversion saved, what it cost, and where it is faster or slower than the dense model.

The road: everything that can be refused is refused; memory, a process a model; then all models are loaded side by side
for quality, experts and speed; verdicts; other engines, in processes of their own; an earlier result. Encoders of text
and of images go it too: their quality is their own measure, their speed one pass over a batch of examples.

Traps: other work on the machine makes intervals wide and, as all models suffer alike, ratios less wrong than times. All
models are in memory at once.

Legend: B blocks of C tokens, T tokens.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from moeify.benchmark.ceilings import measure_ceilings
from moeify.benchmark.engines import run as engines
from moeify.benchmark.machine import device_by_name, machine_facts, versions
from moeify.benchmark.models import baseline as baselines
from moeify.benchmark.models.anatomy import writes_text
from moeify.benchmark.models.as_needed import counted, resized
from moeify.benchmark.models.contenders import contenders
from moeify.benchmark.models.examples import Examples, suited_options
from moeify.benchmark.models.expert_use import expert_use
from moeify.benchmark.models.inputs import DENSE, Entrant, Texts, dtype_of, model_of, name_models, open_models
from moeify.benchmark.models.memory import measure_memory
from moeify.benchmark.models.quality import measure_quality
from moeify.benchmark.models.results import LayerExperts, ModelBench
from moeify.benchmark.models.samples import write_samples
from moeify.benchmark.models.speed import READING, WRITING, measure_speed
from moeify.benchmark.models.verdicts import verdicts
from moeify.benchmark.options import BenchOptions, Section
from moeify.benchmark.timing import timer_for
from moeify.check.calibrated import warn_of_kind
from moeify.check.evaluate import load
from moeify.check.perplexity import warn_of_few
from moeify.check.tasks import Tasks
from moeify.command_line import command_line, names_of
from moeify.errors import UsageError
from moeify.options import Names, Track
from moeify.progress import shown
from moeify.results import check_new, check_writable, read, write

FILE = "bench.json"
PACKAGES = ("moeify", "torch", "transformers", "triton")


def bench(
    models: Names,
    against: Names,
    options: BenchOptions | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    baseline: str | Path | None = None,
    threshold: float = 1.05,
    track: Track[Any] = shown,
    **choices: Any,
) -> ModelBench:
    """Measure models beside the dense one they came from.

    Args:
        models: converted checkpoints.
        against: the dense model, then further ones, such as a pruned control.
        options: what is measured.
        out: a folder for bench.json.
        overwrite: replace one that is there.
        baseline: an earlier bench.json, or its folder.
        threshold: how many times worse than there something may be.
        track: wraps long loops.
        choices: single options by name, in place of those in `options`.

    Raises:
        UsageError: options that contradict each other.
        InputError: a model or text that cannot be used, models that do not compare, an existing result.

    Example:
        result = moeify.bench("my-moe", "builtin", out="my-bench", batch=1, prompt=64)
        moeify.report("my-bench")
    """
    models, against, options = names_of(models), names_of(against), BenchOptions.chosen(options, choices)
    out, baseline = (None if path is None else Path(path) for path in (out, baseline))
    baselines.check_threshold(threshold)
    if out is not None:
        check_folder(out, overwrite=overwrite)
    old = load_bench(baseline) if baseline else None
    device = device_by_name(options.device)
    check_engines(options)
    entrants: list[Entrant] = []
    texts: Texts | Examples | None = None
    if "transformers" in options.engine:
        entrants = open_models(models, against, track)
        if not writes_text(entrants[0].config):
            check_no_engine(options, entrants[0])
            options = suited_options(options, entrants)
    tasks = Tasks(options.tasks, options.questions, track)
    if entrants:
        texts = (Texts if writes_text(entrants[0].config) else Examples).of(entrants, options)
        opened = _opened(entrants, texts.context, dtype_of(options.dtype, entrants[0].config, device))
    else:
        opened = engines.open_models(name_models(models, against), options, track)
    result = ModelBench(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command_line(
            "bench",
            *models,
            options,
            against=against,
            out=out,
            overwrite=overwrite,
            baseline=baseline,
            threshold=threshold if baseline else None,
        ),
        machine=machine_facts(device),
        versions=versions(PACKAGES),
        dtype=opened.dtype,
        context=opened.context,
        models=opened.models,
    )
    if old is not None:
        # Sizes are known by now; two runs of other models need not be measured first.
        baselines.compare(result, old, str(baseline), threshold)
    if texts is not None and "memory" not in options.skip:
        _memory(result, entrants, texts, device, track)
    if texts is not None and (options.tasks or set(get_args(Section)) - {"memory", *options.skip}):
        _measure(result, entrants, texts, tasks, options=options, device=device, track=track)
    if "llama.cpp" in options.engine:
        rows = engines.measure(opened.subjects, options, context=opened.context, track=track)
        result.engine_files, result.engine_speed = rows.files, rows.speed
        result.versions = {**result.versions, "llama.cpp": rows.version or None}
    if old is not None:
        result.regressions = baselines.compare(result, old, str(baseline), threshold)
    if out is not None:
        write(result, out / FILE)
    return result


def check_engines(options: BenchOptions) -> None:
    """Raise InputError, before any work, if an engine that shall be timed is not here."""
    if "llama.cpp" in options.engine:
        engines.check_programs()


def check_no_engine(options: BenchOptions, dense: Entrant) -> None:
    """Raise UsageError if an encoder shall be timed in an engine that has language models alone."""
    if "llama.cpp" in options.engine:
        raise UsageError(
            f"llama.cpp is timed on language models, {dense.source} is an encoder", "leave --engine llama.cpp out"
        )


def load_bench(path: str | Path) -> ModelBench:
    """Read a result, or the one in a folder.

    Raises:
        InputError: there is none, or it is of another kind.

    Example:
        rows = moeify.load_bench("my-bench").speed
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    return read(file, ModelBench, f"name a file that moeify bench -o FOLDER wrote: FOLDER/{FILE}")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise InputError for a folder whose result cannot be written, or must not be replaced."""
    check_new(folder / FILE, overwrite=overwrite)
    check_writable(folder / FILE, ModelBench)


def _opened(entrants: Sequence[Entrant], context: int, dtype: torch.dtype) -> engines.Opened:
    """What an engine needs to know of them as well; a GGUF file goes there as it is."""
    dense_ffn = entrants[0].anatomy.parts["ffn"].parameters
    return engines.Opened(
        models=[model_of(one, dense_ffn, context=context, element_bytes=dtype.itemsize) for one in entrants],
        subjects=[engines.subject(one) for one in entrants],
        context=context,
        dtype=str(dtype).removeprefix("torch."),
    )


def _memory(
    result: ModelBench, entrants: Sequence[Entrant], texts: Texts | Examples, device: torch.device, track: Track[Any]
) -> None:
    """Before anything is loaded here, so that there is room."""
    inputs, writes = texts.largest, isinstance(texts, Texts)
    for number, one in enumerate(track(entrants, "memory", len(entrants))):
        found = measure_memory(one.path, inputs, writes=writes, dtype=result.dtype, device=str(device))
        result.models[number] = replace(
            result.models[number],
            load_peak_memory_bytes=found.load_peak_bytes,
            peak_memory_bytes=found.peak_bytes,
            memory_reason=found.reason,
        )


def _measure(
    result: ModelBench,
    entrants: Sequence[Entrant],
    texts: Texts | Examples,
    tasks: Tasks,
    *,
    options: BenchOptions,
    device: torch.device,
    track: Track[Any],
) -> None:
    """Everything that needs loaded models."""
    loaded = {
        one.name: load(str(one.path), dtype=result.dtype, device=str(device))
        for one in track(entrants, "loading", len(entrants))
    }
    entrants = [counted(one, loaded[one.name], texts, track) for one in entrants]
    dense_ffn, element_bytes = entrants[0].anatomy.parts["ffn"].parameters, loaded[DENSE].dtype.itemsize
    result.models = [
        resized(model, one, dense_ffn, context=texts.context, element_bytes=element_bytes)
        for model, one in zip(result.models, entrants, strict=True)
    ]
    if "quality" not in options.skip:
        warn_of_kind({Path(model.path).name: model.calibrated_on for model in result.models}, options.data)
        if isinstance(texts, Texts):
            _quality(result, loaded, texts, track)
        else:
            result.scores = texts.scores(loaded, track)
    for one in entrants:
        tasks.ask(loaded[one.name], one.name, one.path, track)
    result.tasks = list(tasks.results())
    if "experts" not in options.skip:
        result.experts = {
            one.name: _experts(loaded[one.name], texts, track) for one in entrants if one.anatomy.experts is not None
        }
    timer = timer_for(device)
    if options.roofline:
        result.ceilings = measure_ceilings(timer, loaded[DENSE].dtype)
    if "speed" not in options.skip:
        result.speed = measure_speed(
            contenders(loaded, {one.name: one.anatomy for one in entrants}, options.implementation),
            texts.cases,
            timer,
            phases=WRITING if isinstance(texts, Texts) else READING,
            dense=DENSE,
            seconds=options.seconds_per_row,
            ceilings=result.ceilings,
            track=track,
        )
        result.verdicts = verdicts(result.models, result.speed)


def _quality(result: ModelBench, loaded: Mapping[str, Any], texts: Texts, track: Track[Any]) -> None:
    """Of language models: perplexity and the like, and what they write."""
    for source, ids_BC in texts.blocks.items():
        warn_of_few(source, ids_BC.numel() - len(ids_BC))
    static = [model.name for model in result.models if model.kind == "static"]
    result.quality = measure_quality(loaded, DENSE, texts.blocks, static=static, track=track)
    result.samples = write_samples(loaded, texts.blocks, texts.tokenizer, texts.longest, track=track)


def _experts(model: Any, texts: Texts | Examples, track: Track[Any]) -> list[LayerExperts]:
    if isinstance(texts, Examples):
        return texts.experts(model, track)
    return expert_use(model, texts.blocks, lambda token: str(texts.tokenizer.decode([token])), track=track)
