"""Everything that a stated time buys: layers by a search, a split, and training with the minutes that are left.

    OUT.untrained    the finished split, until OUT is there; a run that was stopped goes on from it
    OUT              the trained model

What comes first was measured: which layers are cut costs least and brings most, then the split, and no use of the
remaining time beat distillation: neither more calibration tokens nor training one FFN at a time (recipes/README.md).
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from moeify.convert.pipeline import split
from moeify.errors import InputError, UsageError
from moeify.export.gguf import check_package
from moeify.export.gguf.result import ExportResult
from moeify.export.record import RECORD_FILE, check_out, check_replaceable, read_record
from moeify.export.workspace import remove_result
from moeify.models.dense import DenseModel, open_dense
from moeify.options import Announce, ExportOptions, SplitOptions, Track
from moeify.plan import Layout, load_plan
from moeify.progress import said, shown
from moeify.readable import Readable
from moeify.training.finetune import FinetuneResult, finetune
from moeify.training.options import FinetuneOptions
from moeify.words import duration

# Where nobody says how much is to be active.
BUDGET = 0.75
# What the split settles, or counts anew, where nobody says: the record of a finished one has its own values.
SETTLED = ("experts", "shared", "active", "budget", "dense_layers", "target", "calibration", "context", "device")
# Fewer minutes are not worth opening two models for.
FEWEST_MINUTES = 1.0


@dataclass(frozen=True, repr=False)
class TimedSplit(Readable):
    """What was written, and what the time went to.

    Args:
        out: the new checkpoint.
        target: its architecture.
        layout, num_layers: experts, shared, active; of so many layers.
        num_parameters, num_active_parameters: of the whole model.
        calibration_tokens: that the split saw.
        finetune: the training; None where no time was left for it.
        seconds: stage -> time that it took; a split that an earlier run finished took none.
        gguf: the file for llama.cpp, if there is one.
    """

    out: Path
    target: str
    layout: Layout
    num_layers: int
    num_parameters: int
    num_active_parameters: int
    calibration_tokens: int
    finetune: FinetuneResult | None
    seconds: Mapping[str, float]
    gguf: ExportResult | None = None


def split_within(
    model: str | Path | DenseModel,
    out: str | Path,
    minutes: float,
    options: SplitOptions | None = None,
    *,
    gguf: str | Path | None = None,
    export: ExportOptions | None = None,
    overwrite: bool = False,
    track: Track[Any] = shown,
    announce: Announce = said,
    **choices: Any,
) -> TimedSplit:
    """Split a model and train it, in so many minutes in all.

    The search takes a budget of 0.75 unless a layout or a budget is given. Training sees text of the same sources as
    the split.

    Args:
        model, out, options, gguf, export, overwrite, track, choices: as of `split`.
        minutes: for everything.
        announce: told what the time is spent on.

    Raises:
        InputError, UsageError, CheckError: as `split` and `finetune`.

    Example:
        result = moeify.split_within("builtin", "my-moe", 2, experts=8)
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
    if _is_open(options):
        options = replace(options, budget=BUDGET)
    untrained = out.with_name(f"{out.name}.untrained")
    seconds: dict[str, float] = {}
    if not _is_finished(untrained, dense, options):
        split(dense, untrained, options, overwrite=overwrite, track=track, announce=announce)
        seconds["split"] = time.perf_counter() - began
    left = minutes - (time.perf_counter() - began) / 60
    trained = None
    if left >= FEWEST_MINUTES:
        announce(f"training for the other {duration(left * 60)}")
        plan = load_plan(untrained)
        train = FinetuneOptions(
            stage=("full",),
            data=plan.options.calibration,
            minutes=_left_before(out) or round(left, 1),
            context=plan.options.context,
            seed=options.seed,
            device="cpu" if options.device == "cpu" else "cuda",
        )
        start = time.perf_counter()
        trained = finetune(untrained, dense, out, train, overwrite=overwrite, track=track)
        seconds["training"] = time.perf_counter() - start
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


def _is_open(options: SplitOptions) -> bool:
    """Whether nothing says how much is to be active, so that a search may."""
    chosen = (options.active, options.shared, options.budget, options.machine, options.plan)
    return chosen == (None,) * len(chosen) and not (options.dense_layers or options.static or options.mixing == "soft")


def _is_finished(folder: Path, dense: DenseModel, options: SplitOptions) -> bool:
    """Whether a split with these options of this model lies there.

    Raises:
        InputError: another one does.
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
    if differs:
        raise InputError(
            f"{folder} is of an unfinished run that differs in: {', '.join(differs)}",
            "remove that folder, or repeat the command that began it",
        )
    return True


def _left_before(out: Path) -> float | None:
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
        layout=plan.layout,
        num_layers=len(plan.layers),
        num_parameters=int(record["parameters"]),
        num_active_parameters=int(record["active_parameters"]),
        calibration_tokens=plan.options.tokens,
        finetune=trained,
        seconds=seconds,
        gguf=exported,
    )
