"""Multiple choice for conversions that are only tried out: choices as rows of tokens that ride along with the text.

Legend: B rows of C tokens, L = C - 1 losses a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeify.check.tasks import compared
from moeify.check.tasks_results import TaskResult
from moeify.check.tasks_scores import Questions, encode_pair


@dataclass(frozen=True)
class TaskRows:
    """All choices of all questions, cut into tokens.

    Args:
        tasks: the questions.
        ids_BC: a row a choice, padded behind it, where causal attention does not look; None without questions.
        spans: of each row the losses that are of the choice: the first, and the one behind the last.
    """

    tasks: tuple[Questions, ...] = ()
    ids_BC: Tensor | None = None
    spans: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, tasks: Sequence[Questions], tokenizer: Any, limit: int) -> "TaskRows":
        """Cut them into tokens.

        Args:
            tasks: the questions.
            tokenizer: of the model.
            limit: tokens that it takes; of what is longer the end counts.
        """
        if not tasks:
            return cls()
        rows, spans = [], []
        for text, choice in (pair for task in tasks for pair in task.pairs):
            before, behind = encode_pair(tokenizer, text, choice)
            row = (before + behind)[-limit:]
            rows.append(row)
            spans.append((max(0, len(row) - len(behind) - 1), len(row) - 1))
        width = max(map(len, rows))
        ids_BC = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return cls(tuple(tasks), ids_BC, tuple(spans))

    def likelihoods(self, losses_BL: Tensor) -> list[float]:
        """Log probability of each choice, from the losses of the rows."""
        return [
            -float(losses_L[first:end].double().sum())
            for losses_L, (first, end) in zip(losses_BL, self.spans, strict=True)
        ]

    def results(self, likelihoods: Mapping[str, Sequence[float]]) -> Iterator[TaskResult]:
        """Of each conversion, by name, the first of which the others are compared with."""
        answers: dict[str, list[Any]] = {name: [] for name in likelihoods}
        for name, values in likelihoods.items():
            first = 0
            for task in self.tasks:
                answers[name] += task.scores(values[first : first + len(task.pairs)])
                first += len(task.pairs)
        return compared(answers)
