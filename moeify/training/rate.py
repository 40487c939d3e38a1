"""How many tokens can be trained on in so many minutes: a few steps are timed, and nothing of them stays."""

import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from moeify.cache import intact
from moeify.errors import UsageError
from moeify.models.dense import DenseModel, open_dense
from moeify.models.inputs import num_blocks, some_blocks
from moeify.options import Track, untracked
from moeify.training.examples import block_tokens, most_tokens
from moeify.training.inputs import Inputs, open_inputs
from moeify.training.model import Student
from moeify.training.options import FinetuneOptions, Stage
from moeify.training.stage import train_stage
from moeify.training.targets import open_targets
from moeify.training.thresholds import THRESHOLD_TOKENS

# The first step makes buffers and kernels.
WARM_STEPS, TIMED_STEPS = 1, 3
# One timed step is enough where all so far took such a share of the minutes: on 2 cores of an AMD EPYC 7003 without AMX
# four steps of SmolLM2-135M take 140 s (2,048 tokens each, float32, PyTorch 2.13, 2026-11-26), the first the longest.
ENOUGH_SHARE = 0.02
# What a step takes later is not exactly what it took now, and the result has to be written.
RESERVE = 0.08
# Minutes from one evaluation and checkpoint to the next.
EVERY_MINUTES = 15
# Text that is seen more often teaches little more (https://arxiv.org/abs/2305.16264).
MOST_EPOCHS = 4
# Fewer steps say nothing about a learning rate.
FEWEST_STEPS = 8
# Student forward and backward pass and the teacher's forward pass over both forward passes alone.
STEP_OVER_EVALUATION = 2.0


class MinutesError(UsageError):
    """So few minutes leave no time to train."""


def settle_tokens(
    moe: str,
    teacher: str | Path | DenseModel,
    options: FinetuneOptions,
    *,
    out: Path,
    processes: PartialState,
    track: Track[Any],
) -> FinetuneOptions:
    """The options with tokens, epochs and evaluations that fit into their minutes.

    A run that goes on keeps what it began with, so that it ends with the same bits.

    Args:
        moe, teacher, options, track: as of `finetune`.
        out: where the result will go.
        processes: all of them train on what the first one settles.

    Raises:
        MinutesError: they are too few for FEWEST_STEPS steps.
        InputError: as `open_inputs`.
    """
    settled = [_earlier(out, options) if processes.is_main_process else None]
    broadcast_object_list(settled)
    if settled[0] is None:
        settled = [_measured(moe, teacher, options, out=out, processes=processes, track=track)]
        broadcast_object_list(settled)
    chosen = settled[0]
    assert chosen is not None
    return chosen


def _earlier(out: Path, options: FinetuneOptions) -> FinetuneOptions | None:
    """What an unfinished run at OUT settled for the same options."""
    job = intact(out.with_name(f"{out.name}.partial") / "job.json", lambda file: json.loads(file.read_text()))
    earlier = (job or {}).get("options", {})
    names = ("tokens", "epochs", "every")
    if not isinstance(earlier, dict) or any(name not in earlier for name in names):
        return None
    settled = replace(options, **{name: earlier[name] for name in names})
    return settled if json.loads(json.dumps(asdict(settled))) == earlier else None


def _measured(
    moe: str,
    teacher: str | Path | DenseModel,
    options: FinetuneOptions,
    *,
    out: Path,
    processes: PartialState,
    track: Track[Any],
) -> FinetuneOptions:
    assert options.minutes is not None
    began = time.perf_counter()
    num_steps = WARM_STEPS + TIMED_STEPS + 1
    step_blocks = options.batch * options.accumulate * int(processes.num_processes)
    dense = open_dense(teacher, track)
    needed = num_steps * step_blocks * block_tokens(dense, options)
    has = most_tokens(dense, options, needed)
    probe = replace(options, minutes=None, tokens=min(needed, has), epochs=-(-needed // has), every=1 << 30)
    inputs = open_inputs(moe, dense, probe, track)
    opened = time.perf_counter() - began
    step_tokens, drawn = step_blocks * inputs.context, num_blocks(inputs.train) * inputs.context
    enough_s = ENOUGH_SHARE * options.minutes * 60
    step_s = sum(
        _step_seconds(inputs, probe, stage, out, processes=processes, enough_s=enough_s) for stage in options.stage
    )
    # Sound and images are read, and sound is written down, for every block, as text is that the model itself writes.
    is_made = "self" in options.data or dense.family.modality != "text"
    text_s = opened / drawn * step_tokens if is_made else 0.0
    stages = max(1, round(options.minutes / EVERY_MINUTES)) if options.every is None else 0
    token_s = step_s / step_tokens / STEP_OVER_EVALUATION
    evaluated = (1 + stages) * num_blocks(inputs.held_out) * inputs.context
    # The student alone, twice: as much as an evaluation.
    evaluated += THRESHOLD_TOKENS if inputs.plan is not None and inputs.plan.layout.is_adaptive else 0
    left = options.minutes * 60 * (1 - RESERVE) - (time.perf_counter() - began) - opened
    steps = math.floor((left - evaluated * token_s) / (step_s + text_s))
    if steps < FEWEST_STEPS:
        raise MinutesError(
            f"{options.minutes:g} minutes are too few for {FEWEST_STEPS} steps: one takes {step_s + text_s:.0f} s here",
            f"--minutes takes {math.ceil(options.minutes + (FEWEST_STEPS - steps) * (step_s + text_s) / 60)} or more",
        )
    most = most_tokens(dense, replace(options, context=inputs.context), steps * step_tokens)
    epochs = max(options.epochs, min(MOST_EPOCHS, -(-steps * step_tokens // most)))
    tokens = min(most, steps * step_tokens // epochs)
    every = options.every or math.ceil(tokens * epochs / step_tokens / stages)
    return replace(options, tokens=tokens, epochs=epochs, every=every)


def _step_seconds(
    inputs: Inputs, options: FinetuneOptions, stage: Stage, out: Path, *, processes: PartialState, enough_s: float
) -> float:
    """Time of one step, the median of TIMED_STEPS or of those in enough_s; the student that made them is dropped."""
    # As a run opens it, but that a cache would be of text that nobody trains on.
    few = replace(inputs, held_out=some_blocks(inputs.held_out, slice(1)))
    targets = open_targets(few, replace(options, cache_teacher=False), processes, untracked)
    clock = _Clock(enough_s)
    with tempfile.TemporaryDirectory(prefix=".moeify-", dir=out.parent) as folder, suppress(_EnoughError):
        train_stage(
            Student.open(inputs.path, inputs.plan),
            targets,
            stage,
            options,
            folder=Path(folder) / "steps",
            logs=Path(folder) / "logs",
            processes=processes,
            track=clock.track,
        )
    return median(after - before for before, after in zip(clock.times, clock.times[1:], strict=False))


class _EnoughError(Exception):
    """Ends training before its first checkpoint."""


class _Clock:
    """Notes when steps end, and ends training once there are enough."""

    def __init__(self, enough_s: float) -> None:
        self.enough_s = enough_s
        self.times: list[float] = []

    def track(self, items: Iterable[Any], _: str, __: int) -> Iterator[Any]:
        # Asked for the first item where training begins, and for one more behind every step.
        began = time.perf_counter()
        for number, item in enumerate(items):
            now = time.perf_counter()
            if number >= WARM_STEPS:
                self.times.append(now)
            timed = len(self.times) - 1
            if timed == TIMED_STEPS or (timed > 0 and now - began > self.enough_s):
                raise _EnoughError
            yield item
