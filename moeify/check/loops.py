"""Whether a chat model still knows when to stop: loops, endless answers and repeats in its answers to a few questions.

Every model with a chat template answers the same embedded questions, the likeliest token again and again, where models
that lost quality fall into loops first. Perplexity does not see it: it never reads what a model writes itself.

Legend: Q questions, T tokens of an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from moeify.errors import InputError, warn
from moeify.models.chat import FIXED, conversation_ids, has_template
from moeify.models.generation import ends_of
from moeify.models.tokenizer import load_tokenizer
from moeify.options import Track

# Written for this; what a small model answers in some sentences, and some that need a list or code.
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Name five animals that live in Africa.",
    "Write a Python function that reverses a string.",
    "What is the difference between a virus and a bacterium?",
    "Give me three tips for better sleep.",
    "Translate 'good morning' into Spanish, French and German.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "What is 17 plus 26? Explain your steps.",
    "Write a polite email to my landlord about a broken heater.",
    "Summarise the story of Cinderella in three sentences.",
    "Why do leaves change colour in autumn?",
    "List the planets of the solar system in order.",
    "What should I pack for a weekend in the mountains?",
    "Explain what a database is to a child.",
    "Tell me a joke.",
    "What are the advantages and disadvantages of electric cars?",
    "Write one paragraph about the history of bread.",
    "How does a bicycle stay upright?",
    "Suggest a name for a coffee shop, and say why.",
    "What is photosynthesis?",
    "Write a dialogue between a cat and a dog.",
    "How can I learn to play the guitar?",
    "What does 'carpe diem' mean?",
    "Describe a rainy day in a big city.",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Give me a recipe for pancakes.",
    "What causes the tides?",
    "Write a haiku about winter.",
    "Is it better to read books or to watch films? Give reasons.",
)
NEW_TOKENS = 256
BATCH = 16
# A loop says the same at least three times in a row, and repeats at least so many tokens; a period is at most so long.
REPEATED_TOKENS, LONGEST_PERIOD = 16, 64
# SmolLM2-135M answers 32 questions in 87 s of one core, in float32; the default of 16 takes half of that.
# As seq-rep-4 of Welleck et al., https://arxiv.org/abs/1908.04319
NGRAM = 4


@dataclass(frozen=True)
class LoopResult:
    """How a model's answers end.

    Args:
        model: its name.
        num_answers: that it gave, one a question.
        num_tokens: of all answers.
        limit_tokens: at which an answer is cut off.
        loops: answers that run into a loop: the same tokens at least three times in a row.
        endless: answers that do not end before the limit.
        repeat_rate: share of an answer's sequences of four tokens that stood in it before; mean over the answers.
    """

    model: str
    num_answers: int
    num_tokens: int
    limit_tokens: int
    loops: int
    endless: int
    repeat_rate: float

    @property
    def loop_rate(self) -> float:
        """Share of the answers that run into a loop."""
        return self.loops / self.num_answers

    @property
    def endless_rate(self) -> float:
        """Share of the answers that do not end before the limit."""
        return self.endless / self.num_answers


class Loops:
    """The questions, asked of one model after another.

    Args:
        paths: folders of the models, by name.
        num_questions: the first so many of QUESTIONS; 0 asks nothing.
    """

    def __init__(self, paths: Mapping[str, Path], num_questions: int) -> None:
        self._questions = QUESTIONS[:num_questions]
        self._paths = paths if num_questions else {}
        self._results: list[LoopResult] = []

    def ask(self, model: Any, name: str, track: Track[Any]) -> None:
        """Ask a loaded model, if its folder has a chat template."""
        if name not in self._paths:
            return
        tokenizer = load_tokenizer(self._paths[name])
        if not has_template(tokenizer):
            return
        try:
            prompts = [
                conversation_ids(tokenizer, [{"role": "user", "content": question}], name, **FIXED)
                for question in self._questions
            ]
        except InputError as error:
            warn(f"{error}: its answers are not looked at")
            return
        answers: list[tuple[list[int], bool]] = []
        # Those of about one length together, so that little is padded.
        prompts.sort(key=len)
        batches = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
        for batch in track(batches, f"{name} answers questions", len(batches)):
            answers += answer(model, batch, ends_of(model, tokenizer))
        self._results.append(summary(name, answers))

    def results(self) -> tuple[LoopResult, ...]:
        return tuple(self._results)


def answer(
    model: Any, prompts: Sequence[Sequence[int]], ends: set[int], *, num_tokens: int = NEW_TOKENS
) -> list[tuple[list[int], bool]]:
    """The likeliest continuation of each prompt, without its end token, and whether it ended by one.

    What the model's folder says of generation is not followed: a penalty for repetition would hide what is looked for.
    """
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if isinstance(room, int):
        num_tokens = min(num_tokens, room - longest)
    if num_tokens < 1:
        raise InputError(f"a question of {longest:,} tokens leaves no room in a model of {room}", "--answers 0")
    ids_QT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_QT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    own = model.generation_config
    # transformers fills what is open in a call from there.
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0))
    try:
        made_QT = model.generate(
            ids_QT.to(model.device),
            attention_mask=mask_QT.to(model.device),
            generation_config=GenerationConfig(max_new_tokens=num_tokens, do_sample=False),
        )[:, longest:]
    finally:
        model.generation_config = own
    answers = []
    for made in made_QT.tolist():
        end = next((place for place, token in enumerate(made) if token in ends), None)
        answers.append((made[:end], end is not None))
    return answers


def summary(model: str, answers: Sequence[tuple[Sequence[int], bool]]) -> LoopResult:
    """Count what went wrong in answers, each with whether it ended."""
    return LoopResult(
        model=model,
        num_answers=len(answers),
        num_tokens=sum(len(ids) for ids, _ in answers),
        limit_tokens=NEW_TOKENS,
        loops=sum(has_loop(ids) for ids, _ in answers),
        endless=sum(not ended for _, ended in answers),
        repeat_rate=sum(repeat_rate(ids) for ids, _ in answers) / len(answers),
    )


def has_loop(ids: Sequence[int]) -> bool:
    """Whether some tokens say the same at least three times in a row."""
    for period in range(1, min(LONGEST_PERIOD, len(ids) // 3) + 1):
        needed, run = max(2 * period, REPEATED_TOKENS), 0
        for place in range(period, len(ids)):
            run = run + 1 if ids[place] == ids[place - period] else 0
            if run == needed:
                return True
    return False


def repeat_rate(ids: Sequence[int]) -> float:
    """Share of the sequences of NGRAM tokens that stood in the answer before."""
    grams = [tuple(ids[place : place + NGRAM]) for place in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
