"""How likely a model finds given continuations of given texts: what every multiple choice rests on.

Text is cut into tokens as lm-eval cuts it, so that scores compare with published ones.

Legend: B rows in a batch, C tokens of the longest, K tokens of a continuation, V vocabulary, N questions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeify.options import Track

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Scores:
    """The answers of a model to a task.

    Args:
        task, metric: what they are of.
        values_N: a score a question, float64; one of a right choice, zero of a wrong one.
        chance: mean score of a random choice; None where there is none.
    """

    task: str
    metric: str
    values_N: Tensor
    chance: float | None = None


@dataclass(frozen=True)
class Question:
    """A multiple choice.

    Args:
        pairs: for each choice a text and how it goes on, with the space between.
        answer: index of the right one.
    """

    pairs: tuple[tuple[str, str], ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """The questions of one task; at least one."""

    task: str
    rows: tuple[Question, ...]

    def questions(self) -> "Questions":
        """As those of every task."""
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All choices of all questions in a row."""
        return [pair for question in self.rows for pair in question.pairs]

    def ask(self, model: Any, tokenizer: Any, name: str, track: Track[Any]) -> list[Scores]:
        """Have a model answer them."""
        answers = log_likelihoods(model, tokenizer, self.pairs, f"{name} answers {self.task}", track)
        return self.scores([likelihood for likelihood, _ in answers])

    def scores(self, likelihoods: Sequence[float]) -> list[Scores]:
        """By the likeliest choice, and by the likeliest a character, as lm-eval counts them.

        Args:
            likelihoods: logarithms, of `pairs`.
        """
        right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
        rest = list(likelihoods)
        for question in self.rows:
            own, rest = rest[: len(question.pairs)], rest[len(question.pairs) :]
            lengths = [max(1, len(choice.removeprefix(" "))) for _, choice in question.pairs]
            right["acc"].append(_is_best(own, question.answer))
            normed = [value / length for value, length in zip(own, lengths, strict=True)]
            right["acc_norm"].append(_is_best(normed, question.answer))
        chance = sum(1 / len(question.pairs) for question in self.rows) / len(self.rows)
        return [
            Scores(self.task, metric, torch.tensor(values, dtype=torch.float64), chance)
            for metric, values in right.items()
        ]


def _is_best(values: Sequence[float], answer: int) -> float:
    """One if the answer is the first of the likeliest; the NaN of a broken model is never right."""
    best = max(range(len(values)), key=lambda number: -math.inf if math.isnan(values[number]) else values[number])
    return float(best == answer and not math.isnan(values[answer]))


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], label: str, track: Track[Any]
) -> list[tuple[float, bool]]:
    """Sum of the log probabilities of each continuation in nats, and whether each of its tokens is the likeliest.

    Args:
        model: causal, loaded.
        tokenizer: its own.
        pairs: text and continuation.
        label: of the progress.
        track: wraps the loop over batches.
    """
    limit = int(model.config.get_text_config().max_position_embeddings)
    encoded = [encode_pair(tokenizer, context, continuation) for context, continuation in pairs]
    # Continuations of one token, as the letters of a multiple choice, share a row.
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (context_ids, continuation_ids) in enumerate(encoded):
        # Of what is too long the end counts.
        rows.setdefault(tuple((context_ids + continuation_ids)[:-1][-limit:]), []).append(number)
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    batches = list(_batches(sorted(rows, key=len, reverse=True)))
    for batch in track(batches, label, len(batches)):
        # Padding stands behind the text, where causal attention does not look.
        padded = [[*row, *[0] * (len(batch[0]) - len(row))] for row in batch]
        logits_BCV = model(torch.tensor(padded, device=model.device), use_cache=False).logits
        for row, logits_CV in zip(batch, logits_BCV, strict=True):
            for number in rows[row]:
                answers[number] = _score(logits_CV[: len(row)], encoded[number][1][-len(row) :])
    return answers


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a text and of its continuation; spaces at the text's end belong to the continuation.

    Without a text the continuation follows the token that begins, or else ends, a document.

    Source: lm-eval 0.4.13, lm_eval/api/model.py, TemplateLM._encode_pair and loglikelihood.
    """
    text = context.rstrip()
    whole = tokenizer(context + continuation, verbose=False)["input_ids"]
    begins = tokenizer(text, verbose=False)["input_ids"] if text else []
    if text and 0 < len(begins) < len(whole):
        return whole[: len(begins)], whole[len(begins) :]
    ids = tokenizer(context + continuation, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if (start is None or ids[0] == start) and len(ids) > 1:
        return ids[:1], ids[1:]
    return [0 if start is None else start], ids


def _batches(rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """So many rows, of which the first is the longest, that they hold BATCH_TOKENS with their padding."""
    first = 0
    while first < len(rows):
        count = max(1, BATCH_TOKENS // len(rows[first]))
        yield list(rows[first : first + count])
        first += count


def _score(logits_CV: Tensor, continuation_ids: Sequence[int]) -> tuple[float, bool]:
    logs_KV = logits_CV[-len(continuation_ids) :].float().log_softmax(dim=-1)
    ids_K = torch.tensor(continuation_ids, device=logs_KV.device)
    total = float(logs_KV.gather(1, ids_K[:, None]).double().sum())
    return total, bool((logs_KV.argmax(dim=-1) == ids_K).all())
