"""One stage that trains the whole model at once: `router`, `lora` or `full`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from moeify.finetune_model import Student
from moeify.finetune_options import FinetuneOptions, Stage
from moeify.finetune_teacher import Blocks, Teacher
from moeify.finetune_trainer import (
    COMPLETE_FILE,
    FinetuneTrainer,
    ProgressCallback,
    last_checkpoint,
    training_arguments,
)
from moeify.options import Track

# What changes from run to run is left out of the history, and the mean loss, which is of the last session.
TIMES = ("runtime", "per_second", "flos")


def train_stage(
    student: Student,
    targets: tuple[Teacher, list[Blocks]],
    stage: Stage,
    options: FinetuneOptions,
    *,
    folder: Path,
    logs: Path,
    processes: PartialState,
    track: Track[Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train, from the last complete checkpoint in `folder` if there is one.

    Returns:
        What was trained, by its name in memory, and figures: before, after, num_tokens, history.

    Raises:
        CheckError: the loss became NaN or infinite.
    """
    teacher, (blocks, held_out) = targets
    num_steps = _num_steps(len(blocks), options, processes.num_processes)
    student.prepare(stage, options)
    if options.checkpointing:
        _recompute(student.model)
    if processes.is_main_process:
        _drop_incomplete(folder)
    processes.wait_for_everyone()
    checkpoint = last_checkpoint(folder)
    arguments = training_arguments(folder, options, options.rate(stage), num_steps=num_steps, fresh=checkpoint is None)
    bar = iter(track(range(num_steps), f"training {stage}", num_steps))
    trainer = FinetuneTrainer(
        student,
        teacher,
        options,
        arguments,
        datasets=(blocks, held_out),
        callbacks=_callbacks(options, logs, bar, processes),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if options.patience is None and not _evaluated_last(trainer):
            trainer.evaluate()
        history = [_steady(entry) for entry in trainer.state.log_history if "train_loss" not in entry]
        state = trainer.trained_state()
    finally:
        trainer.detach_model()
    evals = [entry for entry in history if "eval_loss" in entry]
    best = min(evals[1:], key=lambda entry: entry["eval_loss"]) if options.patience is not None else evals[-1]
    figures = {
        "before": _figures(evals[0]),
        "after": _figures(best),
        "num_tokens": int(trainer.state.global_step * blocks.ids_BC.shape[1] * _step_blocks(options, processes)),
        "history": history,
    }
    return state, figures


def _step_blocks(options: FinetuneOptions, processes: PartialState) -> int:
    return options.batch * options.accumulate * int(processes.num_processes)


def _num_steps(num_blocks: int, options: FinetuneOptions, num_processes: int) -> int:
    """As the Trainer counts them."""
    batches = -(-num_blocks // (options.batch * num_processes))
    return options.epochs * -(-batches // options.accumulate)


def _recompute(model: Any) -> None:
    """Activation checkpointing, by the name it has in this version of transformers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _drop_incomplete(folder: Path) -> None:
    """Checkpoints that a kill left half written."""
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
    return {name: value for name, value in entry.items() if not any(part in name for part in TIMES)}


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
