"""Tasks of lm-eval, the harness that published scores come from, with models that moeify has loaded.

Questions, prompts, filters and metrics are lm-eval's; likelihoods are those of tasks_scores.py.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.13.   Legend: N questions.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moeify.check.tasks_scores import Question, Questions, Scores, log_likelihoods
from moeify.errors import InputError, UsageError, first_line
from moeify.options import Track

# Texts of known documents: perplexity by another name.
ROLLING = "loglikelihood_rolling"
ACCURACIES = ("acc", "acc_norm")


def open_harness(names: Sequence[str], limit: int | None, track: Track[Any]) -> dict[str, "HarnessTask"]:
    """Find tasks and fetch their data sets.

    Args:
        names: of tasks, groups and tags of lm-eval, or paths of its .yaml files.
        limit: of questions of each task; None means all.
        track: wraps the loop over tasks.

    Raises:
        UsageError: the package is missing, or there is no such task.
        InputError: a data set cannot be fetched.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(
            f"--tasks {names[0]} needs the lm-eval package",
            "pip install 'moeify[tasks]'; a .jsonl file of questions needs nothing",
        )
    with _silent():
        manager = _manager()
        known = [*manager.all_tasks]
        for name in names:
            if name not in known and not Path(name).is_file():
                near = difflib.get_close_matches(name, known, n=3)
                guess = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
                raise UsageError(f"lm-eval has no task {name!r}, nor is it a .jsonl file", guess)
        tracked = track(names, "fetching tasks", len(names))
        return {name: HarnessTask(name, _loaded(manager, name), limit) for name in tracked}


@cache
def _manager() -> Any:
    """All that lm-eval knows; it reads ten thousand files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _loaded(manager: Any, name: str) -> Any:
    """A task, or all of a group, with their data."""
    try:
        loaded = manager.load([name])
    except Exception as error:
        # Offline, gated, a data set that is gone, a broken file: the libraries below raise many unrelated types.
        raise InputError(f"cannot load task {name}: {first_line(error)}", "check the network and the name") from error
    for task in loaded["tasks"].values():
        if task.OUTPUT_TYPE == ROLLING:
            raise UsageError(f"task {name} measures perplexity, not answers", "name a text with --data instead")
    return loaded


@dataclass(frozen=True)
class HarnessTask:
    """One task or group of lm-eval.

    Args:
        task: as it was named.
        loaded: what its task manager gave.
        limit: of questions of each task.
    """

    task: str
    loaded: Any
    limit: int | None

    def ask(self, model: Any, tokenizer: Any, name: str, track: Track[Any]) -> list[Scores]:
        """Have a model answer; the questions of a group count each, whatever task they are of."""
        from lm_eval.evaluator import evaluate

        with _silent():
            harness = _model(model, tokenizer, f"{name} answers {self.task}", track)
            try:
                found = evaluate(harness, self.loaded, limit=self.limit, bootstrap_iters=0, log_samples=True)
            except ValueError as error:
                # A task that runs code that models write, or that wants pictures.
                raise InputError(f"lm-eval refuses task {self.task}: {first_line(error)}", "name another") from error
        values = {task: _metrics(samples) for task, samples in found["samples"].items()}
        chance = self._chance([sample for samples in found["samples"].values() for sample in samples])
        common = set.intersection(*map(set, values.values()))
        if common:
            order = [metric for metric in next(iter(values.values())) if metric in common]
            pooled = {metric: [value for own in values.values() for value in own[metric]] for metric in order}
            return _scores(self.task, pooled, chance)
        scores = [one for task, own in values.items() for one in _scores(task, own, None)]
        if not scores:
            raise InputError(f"task {self.task} has no score for each question", "name another task")
        return scores

    def questions(self) -> Questions:
        """Its multiple choices, for whoever scores them without a loaded model.

        Raises:
            UsageError: it asks for something else.
        """
        questions: list[Question] = []
        for task in self.loaded["tasks"].values():
            if task.OUTPUT_TYPE != "multiple_choice":
                raise UsageError(f"task {self.task} is no multiple choice", "`moeify eval --tasks` takes it")
            with _silent():
                task.build_all_requests(limit=self.limit, rank=0, world_size=1)
            pairs: dict[int, list[tuple[str, str]]] = {}
            rows: dict[int, Any] = {}
            for instance in task.instances:
                pairs.setdefault(instance.doc_id, []).append(instance.args)
                rows[instance.doc_id] = instance.doc
            for number, own in pairs.items():
                answer, count = task.doc_to_target(rows[number]), len(task.doc_to_choice(rows[number]))
                if not isinstance(answer, int) or not 0 <= answer < count:
                    raise UsageError(f"task {self.task} has several answers", "`moeify eval --tasks` takes it")
                # Behind the choices stand those without the question, for another metric.
                questions.append(Question(tuple(own[:count]), answer))
        return Questions(self.task, tuple(questions))

    def _chance(self, samples: Sequence[Mapping[str, Any]]) -> float | None:
        """Accuracy of a random choice, where every question is a multiple choice."""
        if any(task.OUTPUT_TYPE != "multiple_choice" for task in self.loaded["tasks"].values()):
            return None
        return sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)


def _scores(task: str, values: Mapping[str, Sequence[float]], chance: float | None) -> list[Scores]:
    return [
        Scores(task, metric, torch.tensor(own, dtype=torch.float64), chance if metric in ACCURACIES else None)
        for metric, own in values.items()
    ]


def _metrics(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Metric -> its value for every question; a metric of several filters is named with them."""
    filters = dict.fromkeys(sample["filter"] for sample in samples)
    values: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            # Metrics of the whole, as BLEU, have parts here that are no numbers.
            if isinstance(sample[metric], (bool, int, float)) or hasattr(sample[metric], "item"):
                name = metric if len(filters) == 1 else f"{metric}, {sample['filter']}"
                values.setdefault(name, []).append(float(sample[metric]))
    return values


def _model(model: Any, tokenizer: Any, label: str, track: Track[Any]) -> Any:
    """The model as lm-eval takes one."""
    from lm_eval.models.huggingface import HFLM

    class Tracked(HFLM):  # type: ignore[misc]
        """Likelihoods by our own function, with our progress; what generates text is lm-eval's."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
            return log_likelihoods(model, tokenizer, [request.args for request in requests], label, track)

    return Tracked(pretrained=model, tokenizer=tokenizer, batch_size=8)


@contextmanager
def _silent() -> Iterator[None]:
    """Let lm-eval and its data sets draw no bars beside ours, and log no more than errors."""
    import datasets
    from lm_eval.api import task

    logger, bar, bars = logging.getLogger("lm_eval"), task.tqdm, datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
