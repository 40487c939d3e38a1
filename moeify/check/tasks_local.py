"""Multiple choice from a file of the user's own, without lm-eval.

One JSON object a line, or an array of them:

    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}

`answer` is the index of a choice from 0, its letter, or its text. The rows of ARC, HellaSwag, MMLU and OpenBookQA, as
their data sets on the hub have them, are read as well.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeify.check.tasks_scores import Question, Questions
from moeify.errors import InputError

SUFFIXES = (".jsonl", ".json")
QUESTION = ("question", "query", "question_stem", "ctx", "context", "prompt")
CHOICES = ("choices", "endings", "options")
ANSWER = ("answer", "answerKey", "gold", "label")
HINT = 'a question is {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'


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
        labels = choices.get("label") or ()
        choices = choices.get("text")
    if not isinstance(question, str):
        raise InputError(f"{where}: the question is {type(question).__name__}, expected text", HINT)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise InputError(f"{where}: expected two or more choices of text, found {choices!r:.100}", HINT)
    pairs = tuple((question, f" {one}") for one in choices)
    return Question(pairs, _answer(answer, choices, labels, where))


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
