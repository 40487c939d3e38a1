"""One stage that trains the whole model at once: `router`, `lora` or `full`."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from moeify.models.heads import modality_of
from moeify.models.inputs import Inputs
from moeify.options import Track
from moeify.progress import Resumed
from moeify.resources import check_room
from moeify.training.model import Student
from moeify.training.options import FinetuneOptions, Stage
from moeify.training.outputs import OutputTeacher, OutputTrainer
from moeify.training.states import COMPLETE_FILE, last_checkpoint, reading, step_of
from moeify.training.targets import Targets
from moeify.training.thresholds import Thresholds
from moeify.training.trainer import FinetuneTrainer

CLIP_NORM = 1.0
# An evaluation takes at least so many at once, a block of the usual size: small blocks one by one cost their calls.
EVALUATED_TOKENS = 512
KEPT_CHECKPOINTS = 2
# What changes from run to run is left out of the history, and the mean loss, which is of the last session.
TIMES = ("runtime", "per_second", "flos")


def train_stage(
    student: Student,
    targets: Targets,
    stage: Stage,
    options: FinetuneOptions,
    *,
    folder: Path,
    logs: Path,
    processes: PartialState,
    track: Track[Any],
    sample: Inputs | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train, from the last complete checkpoint in `folder` if there is one.

    Args:
        student, targets, stage, options: what is trained, towards what, and how.
        folder, logs: for checkpoints and for TensorBoard.
        processes: those that share the work.
        track: wraps the loop over steps.
        sample: of what it is trained on, by which thresholds are settled, where it has some.

    Returns:
        What was trained, by its name in memory, and figures: before, after, num_tokens, history.

    Raises:
        CheckError: the loss became NaN or infinite.
    """
    teacher, (blocks, held_out) = targets
    options = replace(options, router_rate=options.rate_of_routers(stage))
    num_steps = _num_steps(len(blocks), options, processes.num_processes)
    student.prepare(stage, options)
    if options.checkpointing:
        _recompute(student.model)
    if processes.is_main_process:
        _drop_incomplete(folder)
    processes.wait_for_everyone()
    checkpoint = last_checkpoint(folder)
    arguments = training_arguments(
        folder,
        options,
        options.rate(stage, hears=modality_of(student.model.config) == "audio"),
        num_steps=num_steps,
        evaluated=max(options.batch, EVALUATED_TOKENS // held_out.block_tokens),
        fresh=checkpoint is None,
    )
    if processes.is_main_process:
        _check_room(student, folder, num_saves=-(-num_steps // int(arguments.save_steps)))
    steps = Resumed(range(num_steps), 0 if checkpoint is None else step_of(checkpoint))
    bar = iter(track(steps, f"training {stage}", num_steps))
    trainer = (OutputTrainer if isinstance(teacher, OutputTeacher) else FinetuneTrainer)(
        student,
        teacher,
        options,
        arguments,
        datasets=(blocks, held_out),
        callbacks=_callbacks(options, logs, bar, processes),
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint is not None:
        with reading(checkpoint):
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    # Before a checkpoint is loaded.
    thresholds = None if sample is None else Thresholds(student, sample, half=options.precision == "bfloat16")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if thresholds is not None:
            thresholds.settle(student.model if trainer.is_fsdp_enabled else student.model.base_model)
        if options.patience is None and (thresholds is not None or not _evaluated_last(trainer)):
            trainer.evaluate()
        history = [_steady(entry) for entry in trainer.state.log_history if "train_loss" not in entry]
        state = trainer.trained_state()
    finally:
        trainer.detach_model()
        if processes.is_main_process:
            # What a full disk cut short takes room that the next run needs.
            _drop_incomplete(folder)
    step_tokens = blocks.block_tokens * options.batch * options.accumulate * int(processes.num_processes)
    num_tokens = int(trainer.state.global_step * step_tokens)
    return state, {**_before_and_after(history, options), "num_tokens": num_tokens, "history": history}


def training_arguments(
    folder: Path, options: FinetuneOptions, rate: float, *, num_steps: int, evaluated: int, fresh: bool
) -> TrainingArguments:
    """How the Trainer runs; nothing of it is left to its defaults that would print, report or ask.

    A run that starts fresh evaluates before its first step, and an evaluation takes `evaluated` blocks at once.
    """
    every = min(options.every or -(-num_steps // 10), num_steps)
    on_cuda = options.device == "cuda"
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=evaluated,
        gradient_accumulation_steps=options.accumulate,
        num_train_epochs=options.epochs,
        learning_rate=rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(options.schedule, options.schedule),
        warmup_steps=math.ceil(options.warmup * num_steps),
        max_grad_norm=CLIP_NORM,
        bf16=options.precision == "bfloat16",
        use_cpu=not on_cuda,
        seed=options.seed,
        data_seed=options.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_on_start=fresh,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=KEPT_CHECKPOINTS,
        load_best_model_at_end=options.patience is not None,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=on_cuda,
        ddp_find_unused_parameters=False,
    )


class ProgressCallback(TrainerCallback):
    """Moves a progress bar along, and marks checkpoints that are complete.

    Args:
        bar: yields once at the start and once more for every step that is done.
        wait: until all processes have written their part of a checkpoint.
    """

    def __init__(self, bar: Iterator[Any], wait: Callable[[], None]) -> None:
        self._bar, self._wait = bar, wait

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        for _step in range(state.global_step + 1):
            next(self._bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        next(self._bar, None)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._wait()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_FILE).touch()


def _num_steps(num_blocks: int, options: FinetuneOptions, num_processes: int) -> int:
    """As the Trainer counts them."""
    batches = -(-num_blocks // (options.batch * num_processes))
    return options.epochs * -(-batches // options.accumulate)


def _check_room(student: Student, folder: Path, *, num_saves: int) -> None:
    """Refuse a disk that could not take the checkpoints: what is trained, and two numbers of AdamW for each of them.

    Raises:
        DiskError: it is too full.
    """
    trained = sum(tensor.numel() * tensor.element_size() for tensor in student.trained_state().values())
    # A new one is complete before the oldest goes.
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    check_room(folder, min(num_saves, KEPT_CHECKPOINTS + 1) * 3 * trained - held)


def _recompute(model: Any) -> None:
    """Activation checkpointing, by the name it has in this version of transformers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _drop_incomplete(folder: Path) -> None:
    """Remove checkpoints that a kill or a full disk left half written."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE_FILE).is_file():
            shutil.rmtree(checkpoint)


def _callbacks(
    options: FinetuneOptions, logs: Path, bar: Iterator[Any], processes: PartialState
) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [ProgressCallback(bar, processes.wait_for_everyone)]
    if options.patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=options.patience))
    if processes.is_main_process:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return callbacks
        writer: Any = SummaryWriter
        callbacks.append(TensorBoardCallback(tb_writer=writer(log_dir=str(logs))))
    return callbacks


def _evaluated_last(trainer: FinetuneTrainer) -> bool:
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(steps) and steps[-1] == trainer.state.global_step


def _steady(entry: dict[str, Any]) -> dict[str, Any]:
    """In one order: the Trainer gives entries from before a resumption sorted, and others not."""
    return {name: value for name, value in sorted(entry.items()) if not any(part in name for part in TIMES)}


def _before_and_after(history: list[dict[str, Any]], options: FinetuneOptions) -> dict[str, dict[str, float]]:
    """Figures of the first evaluation and of the last, or of the best one where training stops early."""
    evals = [entry for entry in history if "eval_loss" in entry]
    after = evals[-1] if options.patience is None else min(evals[1:], key=lambda entry: float(entry["eval_loss"]))
    return {"before": _figures(evals[0]), "after": _figures(after)}


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
