"""Multiple choice from a file of the user's own, without lm-eval.

One JSON object a line, or an array of them:

    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}

`answer` is the index of a choice from 0, its letter, or its text. The rows of ARC, HellaSwag, MMLU and OpenBookQA, as
their data sets on the hub have them, are read as well.

Legend: N questions.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeify.check.tasks_scores import Scores, log_likelihoods
from moeify.errors import InputError
from moeify.options import Track

SUFFIXES = (".jsonl", ".json")
QUESTION = ("question", "query", "question_stem", "ctx", "context", "prompt")
CHOICES = ("choices", "endings", "options")
ANSWER = ("answer", "answerKey", "gold", "label")
HINT = 'a question is {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'


@dataclass(frozen=True)
class Question:
    """A text, its continuations with their leading space, and the index of the right one."""

    text: str
    continuations: tuple[str, ...]
    answer: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(self.text, continuation) for continuation in self.continuations]


@dataclass(frozen=True)
class Questions:
    """The questions of one task."""

    task: str
    questions: tuple[Question, ...]

    def ask(self, model: Any, tokenizer: Any, name: str, track: Track[Any]) -> list[Scores]:
        """Have a model answer them."""
        pairs = [pair for question in self.questions for pair in question.pairs]
        answers = log_likelihoods(model, tokenizer, pairs, f"{name} answers {self.task}", track)
        return self.scores([likelihood for likelihood, _ in answers])

    def scores(self, likelihoods: Sequence[float]) -> list[Scores]:
        """By the likeliest choice, and by the likeliest a character.

        Args:
            likelihoods: of all choices of all questions in a row, logarithms.
        """
        right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
        rest = list(likelihoods)
        for question in self.questions:
            own, rest = rest[: len(question.continuations)], rest[len(question.continuations) :]
            lengths = [max(1, len(text.removeprefix(" "))) for text in question.continuations]
            right["acc"].append(_is_best(own, question.answer))
            normed = [value / length for value, length in zip(own, lengths, strict=True)]
            right["acc_norm"].append(_is_best(normed, question.answer))
        chance = sum(1 / len(question.continuations) for question in self.questions) / len(self.questions)
        return [
            Scores(self.task, metric, torch.tensor(values, dtype=torch.float64), chance)
            for metric, values in right.items()
        ]


def _is_best(values: Sequence[float], answer: int) -> float:
    """One if the answer is the first of the likeliest; the NaN of a broken model is never right."""
    best = max(range(len(values)), key=lambda number: -math.inf if math.isnan(values[number]) else values[number])
    return float(best == answer and not math.isnan(values[answer]))


def open_questions(file: Path, limit: int | None) -> Questions:
    """Read the questions of a file.

    Args:
        file: .jsonl, or .json with an array.
        limit: of questions, the first ones; None means all.

    Raises:
        InputError: it is not there, or holds something else; the line is named.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the questions in {file}: {reason}", HINT) from error
    questions: list[Question] = []
    for where, row in _rows(file, text):
        if limit is None or len(questions) < limit:
            questions.append(_question(row, where))
    if not questions:
        raise InputError(f"{file} holds no questions", HINT)
    return Questions(str(file), tuple(questions))


def _rows(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each object and where it stands."""
    if text.lstrip()[:1] == "[":
        rows = _parsed(text, str(file))
        yield from ((f"{file}, item {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}, line {number}", _parsed(line, f"{file}, line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}", HINT) from error


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is {type(row).__name__}, expected an object", HINT)
    question, choices, answer = (_first(row, names, where) for names in (QUESTION, CHOICES, ANSWER))
    labels: Sequence[Any] = ()
    if isinstance(choices, Mapping):
        # As in ARC: {"text": [...], "label": ["A", "B", ...]}.
        choices, labels = choices.get("text"), choices.get("label") or ()
    if not isinstance(question, str):
        raise InputError(f"{where}: the question is {type(question).__name__}, expected text", HINT)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise InputError(f"{where}: expected two or more choices of text, found {choices!r:.100}", HINT)
    return Question(question, tuple(f" {one}" for one in choices), _answer(answer, choices, labels, where))


def _first(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise InputError(f"{where} has no {' or '.join(names)}, only {', '.join(map(str, row)) or 'nothing'}", HINT)
    return row[name]


def _answer(answer: Any, choices: Sequence[str], labels: Sequence[Any], where: str) -> int:
    """The index of the right choice."""
    if answer in list(labels):
        return list(labels).index(answer)
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    elif isinstance(answer, str) and answer.isascii() and answer.isdigit():
        answer = int(answer[:9])
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise InputError(
        f"{where}: answer {answer!r:.60} is none of the {len(choices)} choices",
        f"an answer is 0 to {len(choices) - 1}, a letter from A on, or the text of a choice",
    )
