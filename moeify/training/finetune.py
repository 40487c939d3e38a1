"""Fine-tuning: a converted checkpoint and its dense teacher in, a better checkpoint of the same format out.

    OUT.partial/work/stage-0-layers.safetensors    what a finished stage changed
    OUT.partial/work/stage-1-full/checkpoint-...   of the stage that runs
    OUT.partial/logs                               TensorBoard, if it is installed

A killed run goes on from its last checkpoint, to the same bits. Under torchrun or accelerate launch every process runs
this; the first one alone reads and writes the output folder.
"""

import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from moeify.data.pairs import without_gaps
from moeify.errors import UsageError
from moeify.export.record import check_is_no_model, check_out
from moeify.export.workspace import Workspace
from moeify.models.dense import DenseModel
from moeify.models.device import find_device, halves_are_fast
from moeify.models.inputs import num_blocks as blocks_of
from moeify.models.inputs import some_blocks
from moeify.options import Track
from moeify.progress import shown
from moeify.readable import Readable
from moeify.results import read, to_json
from moeify.training.inputs import Inputs, open_inputs
from moeify.training.layers import beside, fit_layers
from moeify.training.model import Student
from moeify.training.options import Device, FinetuneOptions, Precision, Stage
from moeify.training.rate import settle_tokens
from moeify.training.targets import Targets, open_targets
from moeify.training.thresholds import THRESHOLD_TOKENS
from moeify.training.writer import write_trained
from moeify.version import __version__

HISTORY_FILE = "finetune.json"
# One process may fit layers or fill the cache for hours while the others wait.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class StageResult:
    """One stage and its figures.

    Args:
        stage: its name.
        num_tokens: tokens it was trained on.
        before, after: figures on held-out text, or the layers' mean error.
        seconds: that it took; None if an earlier run did it.
        peak_memory_bytes: of this process so far, on the GPU if there is one; None if an earlier run did it.
    """

    stage: str
    num_tokens: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    seconds: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class StageHistory:
    """What a stage did, without times, so that the same run writes the same file.

    Args:
        stage, before, after, num_tokens: see StageResult.
        history: one entry for each layer, or for each step and evaluation as the Trainer logs them.
    """

    stage: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    num_tokens: int
    history: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, repr=False)
class FinetuneHistory(Readable):
    """What a fine-tuned checkpoint holds of its training."""

    stages: tuple[StageHistory, ...]


@dataclass(frozen=True, repr=False)
class FinetuneResult(Readable):
    """The folder that was written, and every stage."""

    out: Path
    teacher: str
    stages: tuple[StageResult, ...]

    @property
    def history(self) -> FinetuneHistory:
        """Its figures alone."""
        return FinetuneHistory(tuple(StageHistory(s.stage, s.before, s.after, s.num_tokens) for s in self.stages))


def finetune(
    moe: str | Path,
    teacher: str | Path | DenseModel,
    out: str | Path,
    options: FinetuneOptions | None = None,
    *,
    overwrite: bool = False,
    track: Track[Any] = shown,
    **choices: Any,
) -> FinetuneResult:
    """Train a converted, pruned or dense checkpoint to do what its teacher does.

    Args:
        moe: what `moeify split` wrote, with or without --static, or any dense model of a known family.
        teacher: the dense model: a folder, a .gguf file, a hub id, `builtin`, or one that is open already.
        out: where the result goes; appears only when it is complete.
        options: what to train, on what, and how.
        overwrite: replace an earlier result at `out` once the new one is complete.
        track: wraps long loops to show progress.
        choices: single options by name, in place of those in `options`.

    Raises:
        UsageError: there is no such device here.
        InputError: models, text or place are not usable; `out` is untouched.
        CheckError: the loss became NaN or infinite; the last good checkpoint is kept.

    Example:
        result = moeify.finetune("my-moe", "builtin", "my-moe-tuned", tokens=16384, stage=["layers", "full"])
        print(result.stages[-1].after)
    """
    moe, options = str(moe), FinetuneOptions.chosen(options, choices)
    out = check_out(Path(out), [moe, teacher], overwrite=overwrite)
    check_packages(options)
    device: Device = "cpu" if find_device(options.device).type == "cpu" else "cuda"
    options = replace(options, device=device, precision=_precision(options.precision, device))
    processes = PartialState(cpu=options.device == "cpu", timeout=TIMEOUT)
    if options.minutes is not None:
        options = settle_tokens(moe, teacher, options, out=out, processes=processes, track=track)
    inputs = open_inputs(moe, teacher, options, track)
    check_is_no_model(out, inputs.path, inputs.teacher.path)
    workspace = Workspace(out, _job(inputs, options, processes.num_processes), overwrite=overwrite)
    with ExitStack() as stack:
        if processes.is_main_process:
            stack.enter_context(workspace)
        processes.wait_for_everyone()
        if not workspace.is_complete:
            results = _Stages(inputs, options, workspace, processes, track).run()
            if processes.is_main_process:
                student = _student(inputs, options, workspace, len(options.stage))
                write_trained(student, inputs, options, workspace)
                workspace.check_sources(inputs.check_unchanged)
        else:
            results = _finished(workspace.path / HISTORY_FILE)
        processes.wait_for_everyone()
        if processes.is_main_process:
            workspace.commit()
    return FinetuneResult(out, inputs.teacher.name, results)


def _precision(precision: Precision, device: Device) -> Precision:
    """What `auto` is, chosen once, so that a run that was killed goes on with it."""
    if precision != "auto":
        return precision
    return "bfloat16" if halves_are_fast(device) else "float32"


def check_packages(options: FinetuneOptions) -> None:
    """Raise UsageError, before any work, if a stage needs a package that is not installed."""
    if "lora" in options.stage and find_spec("peft") is None:
        raise UsageError("--stage lora needs the package peft", "pip install 'moeify[train]'")


@dataclass(frozen=True)
class _Stages:
    """The stages of one command."""

    inputs: Inputs
    options: FinetuneOptions
    workspace: Workspace
    processes: PartialState
    track: Track[Any]

    def run(self) -> tuple[StageResult, ...]:
        results: list[StageResult] = []
        history: list[StageHistory] = []
        targets: Targets | None = None
        for number, stage in enumerate(self.options.stage):
            seconds, peak = None, None
            if not self.workspace.has(_state_file(number, stage)):
                began = time.perf_counter()
                if stage == "layers":
                    self._first_alone(partial(self._layers, number))
                else:
                    targets = targets or open_targets(self.inputs, self.options, self.processes, self.track)
                    self._train(number, stage, targets)
                seconds, peak = time.perf_counter() - began, _peak_memory_bytes()
            figures = json.loads((self.workspace.path / _figures_file(number, stage)).read_text())
            history.append(StageHistory(**figures))
            results.append(_stage_result(history[-1], seconds, peak))
        if self.processes.is_main_process:
            text = json.dumps(to_json(FinetuneHistory(tuple(history))), indent=1)
            self.workspace.write_text(HISTORY_FILE, text + "\n")
        return tuple(results)

    def _first_alone(self, work: Callable[[], None]) -> None:
        if self.processes.is_main_process:
            work()
        self.processes.wait_for_everyone()

    def _layers(self, number: int) -> None:
        student = _student(self.inputs, self.options, self.workspace, number)
        teacher = beside(student, self.inputs.teacher)
        some = self._sample(self.options.layer_tokens)
        fits = fit_layers(student, teacher, some, self.options)
        layers = list(self.track(fits, "fitting layers", teacher.num_layers))
        tensors = {name: tensor for layer in layers for name, tensor in layer.tensors.items()}
        figures = {
            "before": {"layer_error": sum(layer.error_before for layer in layers) / len(layers)},
            "after": {"layer_error": sum(layer.error_after for layer in layers) / len(layers)},
            "num_tokens": blocks_of(some) * self.inputs.context,
            "history": [
                {"layer": layer.layer, "error_before": layer.error_before, "error_after": layer.error_after}
                for layer in layers
            ],
        }
        self._finish(number, "layers", tensors, figures)

    def _sample(self, num_tokens: int) -> dict[str, Tensor]:
        """Some of what is trained on, with no gaps between texts."""
        num_blocks = max(1, num_tokens // self.inputs.context)
        return without_gaps(some_blocks(self.inputs.train, slice(num_blocks)), self.inputs.teacher)

    def _train(self, number: int, stage: Stage, targets: Targets) -> None:
        from moeify.training.stage import train_stage

        student = _student(self.inputs, self.options, self.workspace, number)
        is_adaptive = student.plan is not None and student.plan.layout.is_adaptive
        state, figures = train_stage(
            student,
            targets,
            stage,
            self.options,
            folder=self.workspace.path / "work" / f"stage-{number}-{stage}",
            logs=self.workspace.path / "logs" / f"{number}-{stage}",
            processes=self.processes,
            track=self.track,
            sample=self._sample(THRESHOLD_TOKENS) if is_adaptive else None,
        )
        self._first_alone(lambda: self._finish(number, stage, state, figures))
        # The Trainer and its callbacks hold each other, and with them the model and its optimizer.
        del student
        gc.collect()

    def _finish(self, number: int, stage: Stage, state: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """The figures first: a stage with its tensors is done.

        Raises:
            InputError: a model changed while it was read; nothing of it is kept.
        """
        self.workspace.check_sources(self.inputs.check_unchanged)
        self.workspace.write_text(_figures_file(number, stage), json.dumps({"stage": stage, **figures}))
        self.workspace.write_tensors(_state_file(number, stage), state, {"format": "pt"})


def _student(inputs: Inputs, options: FinetuneOptions, workspace: Workspace, number: int) -> Student:
    """The student as it is before stage `number`."""
    student = Student.open(inputs.path, inputs.plan)
    for earlier, stage in enumerate(options.stage[:number]):
        student.apply(stage, options, load_file(workspace.path / _state_file(earlier, stage)))
    return student


def _finished(file: Path) -> tuple[StageResult, ...]:
    return tuple(_stage_result(stage, None, None) for stage in read(file, FinetuneHistory).stages)


def _stage_result(stage: StageHistory, seconds: float | None, peak_memory_bytes: int | None) -> StageResult:
    return StageResult(stage.stage, stage.num_tokens, stage.before, stage.after, seconds, peak_memory_bytes)


def _job(inputs: Inputs, options: FinetuneOptions, num_processes: int) -> dict[str, Any]:
    """Everything that a resumed run must have in common with the one that began."""
    return {
        "model": inputs.files.value,
        "teacher": inputs.teacher.fingerprint(),
        "options": asdict(options),
        "text": inputs.provenance,
        "processes": num_processes,
        "versions": {"moeify": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _peak_memory_bytes() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Kilobytes, but on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _state_file(number: int, stage: str) -> str:
    return f"work/stage-{number}-{stage}.safetensors"


def _figures_file(number: int, stage: str) -> str:
    return f"work/stage-{number}-{stage}.json"
