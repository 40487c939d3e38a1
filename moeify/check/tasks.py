"""Tasks: questions with right answers, from a file (tasks_local.py) or through lm-eval (tasks_harness.py).

Labelled sets are tasks as well (labels.py).

Every model answers the same questions, so that models are compared question by question.

Legend: N questions, S resamples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moeify.check.bootstrap import draws, interval
from moeify.check.labels import LabelTask
from moeify.check.tasks_harness import open_harness
from moeify.check.tasks_local import SUFFIXES, open_questions
from moeify.check.tasks_results import TaskResult
from moeify.check.tasks_scores import Questions, Scores
from moeify.data.labelled import is_labelled, open_labelled
from moeify.errors import InputError, UsageError, warn
from moeify.models.heads import check_language_model
from moeify.models.tokenizer import load_tokenizer
from moeify.options import Track, untracked

# With so many an accuracy is known to within 0.1.
FEW = 100
# Of a normal distribution, two-sided 95 %.
Z = 1.96


class Task(Protocol):
    """Questions that are ready to be asked."""

    def ask(self, model: Any, tokenizer: Any, name: str, track: Track[Any]) -> list[Scores]: ...

    def questions(self) -> Questions: ...


class Tasks:
    """All tasks of a run, opened before any model is loaded, and the answers of each model.

    Args:
        names: .jsonl or .json files, labelled sets, and tasks of lm-eval.
        limit: of questions of each; None means all.
        track: wraps the loop over tasks of lm-eval, whose data sets may have to be fetched.
        context: tokens of a labelled text.

    Raises:
        UsageError: an unknown task, a missing package, or one named twice.
        InputError: a file or data set that cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        limit: int | None = None,
        track: Track[Any] = untracked,
        *,
        context: int | None = None,
    ) -> None:
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        if twice:
            raise UsageError(f"task {twice[0]} is named twice", "name each task once")
        files = [name for name in names if Path(name).suffix in SUFFIXES]
        labelled = [name for name in names if name not in files and is_labelled(name)]
        others = [name for name in names if name not in (*files, *labelled)]
        # A missing package is found before a long file is read.
        harness = open_harness(others, limit, track) if others else {}
        local = {name: open_questions(Path(name), limit) for name in files}
        sets = {name: LabelTask(open_labelled(name), context, limit) for name in labelled}
        opened: dict[str, Task | LabelTask] = {**harness, **local, **sets}
        self._tasks = {name: opened[name] for name in names}
        self._answers: dict[str, list[Scores]] = {}

    def ask(self, model: Any, name: str, path: Path, track: Track[Any]) -> None:
        """Have a loaded model answer everything.

        Args:
            model: it.
            name: in the results.
            path: its folder, which has the tokenizer.
            track: wraps the loops over batches.
        """
        if self._tasks:
            answers = [_ask(task, model, path, name, track) for task in self._tasks.values()]
            self._answers[name] = [scores for own in answers for scores in own]

    def questions(self) -> list[Questions]:
        """Every multiple choice, for models that are only tried out.

        Raises:
            UsageError: a task asks for something else.
        """
        return [_questions(task) for task in self._tasks.values()]

    def results(self) -> tuple[TaskResult, ...]:
        """Of all models that were asked, task by task as the first one answered."""
        return tuple(compared(self._answers))


def _ask(task: Task | LabelTask, model: Any, path: Path, name: str, track: Track[Any]) -> list[Scores]:
    if isinstance(task, LabelTask):
        return task.ask(model, path, name, track)
    check_language_model(model.config, "a multiple choice")
    return task.ask(model, load_tokenizer(path), name, track)


def _questions(task: Task | LabelTask) -> Questions:
    if isinstance(task, LabelTask):
        raise UsageError(f"{task.data.name} is a labelled set, no multiple choice", "`moeify eval` takes labelled sets")
    return task.questions()


def compared(answers: Mapping[str, Sequence[Scores]]) -> Iterator[TaskResult]:
    """Each model's scores, and their difference to the first model's on the same questions."""
    if not answers:
        return
    first = {(scores.task, scores.metric): scores.values_N for scores in next(iter(answers.values()))}
    for model, own in answers.items():
        for scores in own:
            values_N = scores.values_N
            if not len(values_N):
                raise InputError(f"task {scores.task} has no questions", "name another task")
            if len(values_N) < FEW:
                warn(f"task {scores.task} has {len(values_N)} questions; fewer than {FEW} say little of a difference")
            above_N = values_N - first[scores.task, scores.metric]
            means_SN = draws(len(values_N))
            low, high = _wilson(values_N) if _is_binary(values_N) else interval(values_N[means_SN].mean(dim=1))
            above_low, above_high = interval(above_N[means_SN].mean(dim=1))
            yield TaskResult(
                model=model,
                task=scores.task,
                metric=scores.metric,
                num_questions=len(values_N),
                score=_mean(values_N),
                score_low=low,
                score_high=high,
                difference=_mean(above_N),
                difference_low=above_low,
                difference_high=above_high,
                chance=scores.chance,
            )


def _is_binary(values_N: Tensor) -> bool:
    return bool(((values_N == 0) | (values_N == 1)).all())


def _wilson(values_N: Tensor) -> tuple[float, float]:
    """The interval of a share: not empty where all answers are right, or none is."""
    count, share = len(values_N), _mean(values_N)
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _mean(values_N: Tensor) -> float:
    return float(values_N.to(torch.float64).mean())
