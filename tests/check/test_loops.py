"""How answers end: loops are seen, lists are none; a batch answers as each question alone."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.check.evaluate import Evaluation, measure
from moeify.check.loops import QUESTIONS, answer, has_loop, repeat_rate, summary
from moeify.cli.tables.eval import eval_tables
from moeify.errors import MoeifyWarning
from moeify.options import EvalOptions

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
OPTIONS = EvalOptions(tokens=64, context=32, answers=2)


def chatty(taught: Path, to: Path, template: str = TEMPLATE) -> str:
    shutil.copytree(taught, to)
    (to / "chat_template.jinja").write_text(template)
    return str(to)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7] * 17, True),
        ([7] * 16, False),
        ([1, 2, 3] * 7, True),
        ([9, 8, *([1, 2, 3] * 7), 4, 5], True),
        (list(range(40)) * 3, True),
        (list(range(40)) * 2, False),
        (list(range(70)) * 3, False),
        # A numbered list has the same words, but no line is the one before.
        ([token for number in range(12) for token in (100 + number, 1, 2, 3, 4)], False),
        ([], False),
    ],
)
def test_a_loop_says_the_same_three_times_in_a_row(ids: list[int], expected: bool) -> None:
    assert has_loop(ids) is expected


def test_repeats() -> None:
    assert repeat_rate([1, 2, 3]) == 0
    assert repeat_rate(list(range(20))) == 0
    assert repeat_rate([1, 2, 3, 4, 9, 1, 2, 3, 4]) == pytest.approx(1 / 6)


def test_summary() -> None:
    result = summary("m", [([7] * 20, False), ([1, 2, 3, 4, 5], True)])
    assert (result.loops, result.endless, result.num_tokens) == (1, 1, 25)
    assert (result.loop_rate, result.endless_rate) == (0.5, 0.5)
    assert result.repeat_rate == pytest.approx((1 - 1 / 17) / 2)


def test_a_batch_answers_as_each_question_alone(taught: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(taught).eval(), AutoTokenizer.from_pretrained(taught)
    # A penalty for repetition would hide loops, and a folder may ask for it.
    model.generation_config.repetition_penalty = 1.8
    own = model.generation_config
    prompts = [tokenizer(question, add_special_tokens=False)["input_ids"] for question in QUESTIONS[:3]]
    assert len(set(map(len, prompts))) > 1
    together = answer(model, prompts, {1}, num_tokens=8)
    assert model.generation_config is own
    for prompt, (ids, ended) in zip(prompts, together, strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + 8 and (len(text) == len(prompt) or text[-1] != 1):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert ids == [token for token in text[len(prompt) :] if token != 1]
        assert ended is (text[-1] == 1)
    # Whatever comes first ends the answer.
    first = together[0][0][0]
    assert answer(model, prompts[:1], {first}, num_tokens=8) == [([], True)]


def test_models_for_chats_answer(taught: Path, tmp_path: Path) -> None:
    model = chatty(taught, tmp_path / "chatty")
    evaluation = measure([model, str(taught)], OPTIONS)
    (result,) = evaluation.loops
    assert (result.model, result.num_answers) == (model, 2)
    (table,) = eval_tables(evaluation)[1:]
    assert list(table.columns[0].cells) == ["chatty"]
    assert not measure([model], EvalOptions(tokens=64, context=32, answers=0)).loops
    assert len(eval_tables(Evaluation(evaluation.results))) == 1


def test_a_template_that_takes_no_question_is_said(taught: Path, tmp_path: Path) -> None:
    model = chatty(taught, tmp_path / "chatty", "{{ raise_exception('no') }}")
    with pytest.warns(
        MoeifyWarning, match="does not take this conversation: TemplateError: no: its answers are not looked at"
    ):
        assert not measure([model], OPTIONS).loops
