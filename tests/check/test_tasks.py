"""Tasks: likelihoods are those of a loop over tokens, answers are compared pair by pair, files are read or named."""

import json
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file

from moeify.check.compare import compare
from moeify.check.evaluate import load, measure
from moeify.check.tasks import FEW, Tasks, compared
from moeify.check.tasks_local import open_questions
from moeify.check.tasks_scores import Scores, encode_pair, log_likelihoods
from moeify.cli.app import run_command
from moeify.errors import InputError, MoeifyError, MoeifyWarning, UsageError
from moeify.models.tokenizer import load_tokenizer
from moeify.options import EvalOptions, SplitOptions, untracked

ROWS = [
    {"question": "The module", "choices": ["defines names", "x", "eats a whole banana"], "answer": 0},
    {"question": "If it fails, an ", "choices": ["error", "is"], "answer": "is"},
    {"ctx": "Return", "endings": ["a list", "whales"], "label": "1"},
    {"question_stem": "Two", "choices": {"text": ["one", "three"], "label": ["A", "B"]}, "answerKey": "B"},
    {"question": "", "choices": ["The", "zz"], "answer": "a"},
]
ANSWERS = [0, 1, 1, 1, 0]
WriteQuestions = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> WriteQuestions:
    def make(*rows: Any, name: str = "questions.jsonl") -> str:
        file = tmp_path / name
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(file)

    return make


def test_the_layouts_of_known_data_sets_are_read(write: WriteQuestions, tmp_path: Path) -> None:
    questions = open_questions(Path(write(*ROWS, "")), None)
    assert [row.answer for row in questions.rows] == ANSWERS
    assert questions.rows[2].pairs == (("Return", " a list"), ("Return", " whales"))
    (tmp_path / "array.json").write_text("\ufeff" + json.dumps(ROWS, indent=1), encoding="utf-8")
    assert open_questions(tmp_path / "array.json", None).rows == questions.rows
    assert open_questions(tmp_path / "array.json", 2).rows == questions.rows[:2]


GOOD = {"question": "a", "choices": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("3", "line 2 is int, expected an object"),
        ({"text": "a"}, "line 2 has no question or query .* only text"),
        ({**GOOD, "question": 3}, "line 2: the question is int"),
        ({**GOOD, "choices": ["b"]}, "line 2: expected two or more choices"),
        ({**GOOD, "choices": ["b", ""]}, "line 2: expected two or more choices"),
        ({**GOOD, "choices": {"text": "bc"}}, "line 2: expected two or more choices"),
        ({**GOOD, "answer": 2}, "line 2: answer 2 is none of the 2 choices"),
        ({**GOOD, "answer": -1}, "answer -1 is none"),
        ({**GOOD, "answer": "9" * 5000}, "answer 999999999 is none"),
        ({**GOOD, "answer": True}, "answer True is none"),
        ({**GOOD, "answer": [0]}, "is none of the 2 choices"),
    ],
    ids=range(13),
)
def test_a_wrong_line_is_named(write: WriteQuestions, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_questions(Path(write(GOOD, row)), None)


def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(
    write: WriteQuestions, dense_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[list[str], type[MoeifyError], str]] = [
        ([write()], InputError, "holds no questions"),
        ([str(tmp_path / "none.jsonl")], InputError, "No such file"),
        ([str(tmp_path), str(tmp_path)], UsageError, "is named twice"),
    ]
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    cases.append(([str(tmp_path / "latin.jsonl")], InputError, "not UTF-8"))
    for names, kind, message in cases:
        with pytest.raises(kind, match=message):
            Tasks(names)
    if find_spec("lm_eval") is None:
        assert run_command(["eval", str(dense_models["llama"]), "--tasks", "hellaswag,arc_easy"]) == 2
        said = capsys.readouterr().err
        assert "error: --tasks hellaswag needs the lm-eval package" in said
        assert "pip install 'moeify[tasks]'" in said


@torch.no_grad()
def naive(model: Any, ids: list[int], count: int) -> float:
    """One token after the other, nothing batched and nothing padded."""
    total = 0.0
    for position in range(len(ids) - count, len(ids)):
        logits_V = model(torch.tensor([ids[:position]]), use_cache=False).logits[0, -1].double()
        total += float(logits_V.log_softmax(-1)[ids[position]])
    return total


def test_likelihoods_are_those_of_a_loop_over_tokens(dense_models: dict[str, Path]) -> None:
    model, tokenizer = load(str(dense_models["llama"])), load_tokenizer(dense_models["llama"])
    pairs = [
        *(("The module defines", " names"), ("The module defines", " a banana"), ("A ", "b"), ("", "abc"), (" ", "a")),
        ("long " * 60, "end"),
    ]
    answers = log_likelihoods(model, tokenizer, pairs, "", untracked)
    for (text, choice), (likelihood, _) in zip(pairs, answers, strict=True):
        before, behind = encode_pair(tokenizer, text, choice)
        assert tokenizer.decode(behind) == text[len(text.rstrip()) :] + choice
        assert likelihood == pytest.approx(naive(model, (before + behind)[-65:], len(behind)), rel=1e-4), text
    # The likeliest continuation of one token is greedy, another one is not.
    ids = tokenizer("The module")["input_ids"]
    logits_V = model(torch.tensor([ids])).logits[0, -1]
    best, worst = (tokenizer.decode([int(end)]) for end in (logits_V.argmax(), logits_V.argmin()))
    greedy = log_likelihoods(model, tokenizer, [("The module", best), ("The module", worst)], "", untracked)
    assert [is_greedy for _, is_greedy in greedy] == [True, False]


def test_accuracy_is_counted_as_lm_eval_does(write: WriteQuestions) -> None:
    questions = open_questions(Path(write(*ROWS)), None)
    # The likeliest: first of 3; first of two; second; first of two that are equal; NaN.
    likelihoods = [-13.0, -14.0, -19.0, -1.0, -2.0, -3.0, -1.0, -2.0, -2.0, math.nan, math.nan]
    acc, acc_norm = questions.scores(likelihoods)
    assert acc.values_N.tolist() == [1, 0, 1, 0, 0]
    # A character: 13/13, 14/1, 19/19; 1/5, 2/2; 3/6, 1/6; 2/3, 2/5.
    assert acc_norm.values_N.tolist() == [1, 0, 1, 1, 0]
    assert acc.chance == pytest.approx((1 / 3 + 4 / 2) / 5)


def test_models_are_compared_question_by_question() -> None:
    generator = torch.Generator().manual_seed(0)
    first_N = (torch.rand(400, generator=generator) < 0.6).double()
    worse_N = first_N.clone()
    worse_N[torch.arange(400)[first_N == 1][:12]] = 0
    answers = {"a": [Scores("t", "acc", first_N, 0.25)], "b": [Scores("t", "acc", worse_N, 0.25)]}
    a, b = compared(answers)
    assert (a.difference, a.difference_low, a.difference_high) == (0, 0, 0)
    assert b.difference == pytest.approx(-12 / 400)
    # The intervals of both overlap widely; that of the pairs leaves out zero.
    assert b.score_high > a.score
    assert b.difference_high < 0
    assert b.chance == 0.25
    graded = torch.rand(200, generator=generator).double()
    (mean,) = compared({"a": [Scores("t", "f1", graded)]})
    error = float(graded.std()) / 200**0.5
    assert mean.score_high - mean.score == pytest.approx(1.96 * error, rel=0.2)


def test_few_questions_are_warned_of_and_have_no_certain_score() -> None:
    with pytest.warns(MoeifyWarning, match=f"task t has 4 questions; fewer than {FEW}"):
        (result,) = compared({"a": [Scores("t", "acc", torch.ones(4, dtype=torch.float64))]})
    # Wilson's interval of 4 of 4, by hand: 1 / (1 + 1.96 ** 2 / 4).
    assert (result.score_low, result.score_high) == (pytest.approx(0.5101, abs=1e-4), 1.0)


def test_eval_shows_tasks_beside_perplexity(
    dense_models: dict[str, Path], make_dense: MakeDense, write: WriteQuestions, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(dense_models["llama"]), str(make_dense("llama", seed=1))]
    many = [{"question": f"It is {n}", "choices": [f"{n * n} a", "names"], "answer": n % 2} for n in range(130)]
    words = ["eval", *models, "--tokens", "100", "--tasks", write(*many), "--questions", "120"]
    assert run_command([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["results"]) == 2
    rows = value["tasks"]
    assert [(row["model"], row["metric"]) for row in rows] == [(m, k) for m in models for k in ("acc", "acc_norm")]
    assert {row["num_questions"] for row in rows} == {120}
    assert rows[0]["score"] != rows[2]["score"]
    assert run_command(words) == 0
    table = capsys.readouterr().out
    assert "questions.jsonl, acc: 120 questions, 0.500 by chance" in table
    assert f"{rows[2]['difference']:+.3f}" in table
    assert max(map(len, table.splitlines())) <= 80


def test_a_broken_model_is_never_right(dense_models: dict[str, Path], write: WriteQuestions, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(dense_models["llama"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(MoeifyWarning, match="5 questions"):
        found = measure([str(broken)], EvalOptions(tokens=100, tasks=(write(*ROWS),)))
    assert [row.score for row in found.tasks] == [0, 0]


def test_compare_has_the_same_answers_for_the_dense_model(
    dense_models: dict[str, Path], write: WriteQuestions, calibration_file: Path
) -> None:
    name, file = str(dense_models["llama"]), write(*ROWS * 25)
    options = SplitOptions(experts=8, tokens=1024, context=32, calibration=(str(calibration_file),))
    text, only = [str(calibration_file)], ["static"]
    table = compare(name, [0.5], text, options, tokens=128, tasks=[file], only=only)
    alone = compare(name, [0.5], text, options, tokens=128, only=only)
    # Questions ride aside: nothing that is fitted or measured on the text changes.
    assert [row.value for row in table.rows] == [row.value for row in alone.rows]
    assert alone.tasks == ()
    assert list(dict.fromkeys(row.model for row in table.tasks)) == [row.method for row in table.rows]
    known = measure([name], EvalOptions(tokens=100, tasks=(file,))).tasks
    dense = [row for row in table.tasks if row.model == "dense"]
    assert [(row.metric, row.score) for row in dense] == [(row.metric, row.score) for row in known]
    assert any(row.difference != 0 for row in table.tasks)
