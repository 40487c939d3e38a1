"""Everything that a stated time buys: layers by a search, a split, and training with the minutes that are left.

    OUT.untrained    the finished split, until OUT is there; a run that was stopped goes on from it
    OUT              the trained model

What comes first was measured: which layers are cut costs least and brings most, then the split, and no use of the
remaining time beat distillation: neither more calibration tokens nor training one FFN at a time (recipes/README.md).
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moeify.convert.layouts import expert_counts
from moeify.convert.pipeline import split
from moeify.errors import InputError, UsageError
from moeify.export.gguf import check_package
from moeify.export.gguf.result import ExportResult
from moeify.export.record import RECORD_FILE, check_out, check_replaceable, read_record
from moeify.export.workspace import remove_result
from moeify.modeling.configuration_moeify import MODEL_TYPE
from moeify.models.dense import DenseModel, open_dense
from moeify.options import Announce, ExportOptions, SplitOptions, Track
from moeify.plan import SplitPlan, load_plan
from moeify.progress import said, shown
from moeify.readable import Readable
from moeify.training.finetune import FinetuneResult, finetune
from moeify.training.options import FinetuneOptions
from moeify.training.rate import MinutesError

# Where nobody says how much is to be active.
BUDGET = 0.75
# More would take a good part of a short time.
EVAL_TOKENS = 2048
# What the split settles, or counts anew, where nobody says: the record of a finished one has its own values.
SETTLED = (
    *("experts", "shared", "active", "min_active", "max_active", "active_by_layer", "experts_by_layer"),
    *("static_layers", "budget", "dense_layers", "drop_layers", "target", "calibration", "context", "device"),
)


@dataclass(frozen=True, repr=False)
class TimedSplit(Readable):
    """What was written, and what the time went to.

    Args:
        out: the new checkpoint.
        target: its architecture.
        plan: of the split, with its layout, and diagnostics for each layer.
        num_parameters, num_active_parameters: of the whole model.
        finetune: the training; None where no time was left for it.
        seconds: what was done, in the words of its progress -> time that it took; without what an earlier run finished.
        gguf: the file for llama.cpp, if there is one.
    """

    out: Path
    target: str
    plan: SplitPlan
    num_parameters: int
    num_active_parameters: int
    finetune: FinetuneResult | None
    seconds: Mapping[str, float]
    gguf: ExportResult | None = None


def split_within(
    model: str | Path | DenseModel,
    out: str | Path,
    options: SplitOptions | None = None,
    *,
    minutes: float = 15,
    gguf: str | Path | None = None,
    export: ExportOptions | None = None,
    overwrite: bool = False,
    track: Track[Any] = shown,
    announce: Announce = said,
    **choices: Any,
) -> TimedSplit:
    """Split a model and train it, in so many minutes in all.

    Unless a layout or a budget is given, the search takes a budget of 0.75. In moeify's own architecture it takes many
    experts, of which every token gets as many as it needs, or every layer as many as it is worth: what loses less.
    Training sees text of the same sources as the split.

    Args:
        model, out, options, gguf, export, overwrite, track, choices: as of `split`.
        minutes: for everything.
        announce: told how long the search will take, and if no time is left to train.

    Raises:
        InputError, UsageError, CheckError: as `split` and `finetune`.

    Example:
        result = moeify.split_within("builtin", "my-moe", minutes=2, experts=8)
        print(result.seconds)
    """
    began = time.perf_counter()
    if minutes <= 0:
        raise UsageError(f"{minutes:g} minutes are none", "--minutes 15")
    options = SplitOptions.chosen(options, choices)
    out = check_out(Path(out), [model], overwrite=overwrite)
    if gguf is not None:
        check_package()
    dense = open_dense(model, track)
    if _is_open(options) or options.budget is not None:
        options = _open_layout(dense, options)
    untrained = out.with_name(f"{out.name}.untrained")
    seconds: dict[str, float] = {}
    track = _timed(track, seconds)
    if not _is_finished(untrained, dense, options, overwrite=overwrite):
        split(dense, untrained, options, overwrite=overwrite, track=track, announce=announce, quick=True)
    left = minutes - (time.perf_counter() - began) / 60
    trained = _train(dense, untrained, out, left, overwrite=overwrite, track=track)
    if trained is not None:
        remove_result(untrained)
    else:
        announce("no time is left to train, so this is the split alone")
        check_replaceable(out, overwrite=overwrite)
        if out.exists():
            remove_result(out)
        untrained.rename(out)
    exported = None
    if gguf is not None:
        from moeify.export.gguf.export import export_gguf

        exported = export_gguf(out, gguf, export, overwrite=overwrite, track=track)
    return _result(out, trained, seconds, exported)


def _timed(track: Track[Any], seconds: dict[str, float]) -> Track[Any]:
    """The same progress, which also notes how long each loop took."""

    def timed(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        began = time.perf_counter()
        try:
            yield from track(items, label, total)
        finally:
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - began

    return timed


def _train(
    dense: DenseModel, untrained: Path, out: Path, minutes: float, *, overwrite: bool, track: Track[Any]
) -> FinetuneResult | None:
    """Distillation on the texts of the split; None where it has no time."""
    options = load_plan(untrained).options
    minutes = _minutes_before(out) or round(minutes, 1)
    if minutes <= 0:
        return None
    train = FinetuneOptions(
        stage=("full",),
        data=options.calibration,
        minutes=minutes,
        context=options.context,
        eval_tokens=EVAL_TOKENS,
        seed=options.seed,
        device="cpu" if options.device == "cpu" else "cuda",
    )
    try:
        return finetune(untrained, dense, out, train, overwrite=overwrite, track=track)
    except MinutesError:
        return None


def _is_open(options: SplitOptions) -> bool:
    """Whether nothing says how much is to be active, so that a search may."""
    chosen = (options.active, options.shared, options.budget, options.machine, options.plan)
    layers = options.dense_layers or options.active_by_layer or options.experts_by_layer or options.static_layers
    return chosen == (None,) * len(chosen) and not (layers or options.static or options.mixing == "soft")


def _open_layout(dense: DenseModel, options: SplitOptions) -> SplitOptions:
    """The options with a budget; in moeify's own architecture also with many experts, unless a number is given.

    SmolLM2-135M in 15 minutes, perplexity over dense on five unseen texts, geometric mean: every token with as many of
    96 experts as it needs, 72 in the mean, 1.059, where a search for dense layers and as many experts for every token
    gave 1.132; with 48 of 96 1.257 and 1.433 (2 cores of an Intel Xeon, 2026-11-26).
    """
    budget = BUDGET if options.budget is None else options.budget
    if options.target != MODEL_TYPE:
        return replace(options, budget=budget)
    experts = options.experts or max(expert_counts(dense.num_neurons, dense.dtype))
    if options.budget is None and (options.min_active is not None or options.max_active is not None):
        # Said already, so that nothing is left to be measured.
        return replace(options, experts=experts, active=max(1, round(BUDGET * experts)))
    return replace(options, experts=experts, budget=budget)


def _is_finished(folder: Path, dense: DenseModel, options: SplitOptions, *, overwrite: bool) -> bool:
    """Whether a split with these options of this model lies there.

    Raises:
        InputError: another one does, and is not to be overwritten.
    """
    if not folder.exists():
        return False
    try:
        job = read_record(folder / RECORD_FILE)["job"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is in the way and is no split", "move it away, or choose another -o") from error
    given, earlier = json.loads(json.dumps(asdict(options))), job.get("options", {})
    default = json.loads(json.dumps(asdict(SplitOptions())))
    names = [f.name for f in fields(options) if f.name not in SETTLED or given[f.name] != default[f.name]]
    differs = [name for name in names if earlier.get(name) != given[name]]
    if job.get("model") != json.loads(json.dumps(dense.fingerprint())):
        differs.append("model")
    if differs and not overwrite:
        raise InputError(
            f"{folder} is of an unfinished run that differs in: {', '.join(differs)}",
            "--overwrite discards it; the command that began it goes on",
        )
    return not differs


def _minutes_before(out: Path) -> float | None:
    """Minutes of the training that an earlier run began."""
    try:
        job = json.loads((out.with_name(f"{out.name}.partial") / "job.json").read_text())
        return float(job["options"]["minutes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _result(
    out: Path, trained: FinetuneResult | None, seconds: dict[str, float], exported: ExportResult | None
) -> TimedSplit:
    plan, record = load_plan(out), read_record(out / RECORD_FILE)
    return TimedSplit(
        out=out,
        target=plan.target,
        plan=plan,
        num_parameters=int(record["parameters"]),
        num_active_parameters=int(record["active_parameters"]),
        finetune=trained,
        seconds=seconds,
        gguf=exported,
    )
