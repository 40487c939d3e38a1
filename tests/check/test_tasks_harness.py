"""Tasks of lm-eval: its answers are those that lm-eval gives by itself; local files and `compare` agree with it.

Its tasks need the network; here they are files of its own kind, with data from the disk.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moeify.check.evaluate import load
from moeify.check.tasks import Tasks, compared
from moeify.check.tasks_harness import HarnessTask, open_harness
from moeify.check.tasks_rows import TaskRows
from moeify.cli.app import run_command
from moeify.errors import InputError, UsageError
from moeify.models.tokenizer import load_tokenizer
from moeify.options import untracked

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'moeify[tasks]'")
pytestmark = pytest.mark.filterwarnings("default")

ROWS = [
    {"question": f"The module {n}", "choices": [f"defines {n} names", "x", "is"], "answer": n % 3} for n in range(12)
]
METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@pytest.fixture
def make_task(tmp_path: Path) -> Any:
    def make(name: str, **changes: Any) -> str:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        values = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": METRICS,
            **changes,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return str(file)

    return make


def test_answers_are_those_of_lm_eval_of_a_file_and_of_a_comparison(
    make_task: Any, dense_models: dict[str, Path], tmp_path: Path
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name, local = make_task("choice"), str(tmp_path / "rows.jsonl")
    model, tokenizer = load(str(dense_models["llama"])), load_tokenizer(dense_models["llama"])
    (task,) = open_harness([name], 10, untracked).values()
    own = task.ask(model, tokenizer, "m", untracked)
    plain = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), TaskManager().load([name]), limit=10)
    samples = plain["samples"]["choice"]
    assert [scores.metric for scores in own] == ["acc", "acc_norm"]
    for scores in own:
        assert scores.values_N.tolist() == [sample[scores.metric] for sample in samples]
        assert scores.chance == pytest.approx(1 / 3)
    (questions,) = Tasks([local], 10).questions()
    assert task.questions().rows == questions.rows
    assert [one.values_N.tolist() for one in questions.ask(model, tokenizer, "m", untracked)] == [
        one.values_N.tolist() for one in own
    ]
    rows = TaskRows.of([questions], tokenizer, 64)
    assert rows.ids_BC is not None
    with torch.no_grad():
        logits_BCV = model(rows.ids_BC).logits[:, :-1].log_softmax(-1)
    likelihoods = rows.likelihoods(-logits_BCV.gather(2, rows.ids_BC[:, 1:, None])[:, :, 0])
    assert [one.values_N.tolist() for one in questions.scores(likelihoods)] == [one.values_N.tolist() for one in own]


def test_what_writes_text_is_scored_too_and_is_no_choice_to_compare(
    make_task: Any, dense_models: dict[str, Path]
) -> None:
    name = make_task(
        "written",
        output_type="generate_until",
        doc_to_choice=None,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    (task,) = open_harness([name], 3, untracked).values()
    model, tokenizer = load(str(dense_models["llama"])), load_tokenizer(dense_models["llama"])
    (scores,) = task.ask(model, tokenizer, "m", untracked)
    assert (scores.metric, scores.values_N.tolist(), scores.chance) == ("exact_match", [0, 0, 0], None)
    with pytest.raises(UsageError, match="is no multiple choice"):
        task.questions()


def test_tasks_that_there_are_not(make_task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no task 'hellaswg'") as caught:
        Tasks(["hellaswg"])
    assert "hellaswag" in caught.value.hint
    with pytest.raises(UsageError, match="measures perplexity"):
        Tasks([make_task("rolling", output_type="loglikelihood_rolling", doc_to_choice=None, metric_list=None)])
    with pytest.raises(InputError, match=r"cannot load task .*gone"):
        Tasks([make_task("gone", dataset_kwargs={"data_files": {"test": str(tmp_path / "none.jsonl")}})])
    # Offline, as all tests are.
    with pytest.raises(InputError, match="cannot load task hellaswag"):
        Tasks(["hellaswag"])
    assert logging.getLogger("lm_eval").level != logging.ERROR
    assert capsys.readouterr().err == ""


def test_a_group_is_one_row(make_task: Any, dense_models: dict[str, Path]) -> None:
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([make_task("one"), make_task("two")])
    task = HarnessTask("both", loaded, 5)
    model, tokenizer = load(str(dense_models["llama"])), load_tokenizer(dense_models["llama"])
    own = task.ask(model, tokenizer, "m", untracked)
    assert [(scores.metric, len(scores.values_N)) for scores in own] == [("acc", 10), ("acc_norm", 10)]
    with pytest.warns(UserWarning, match="10 questions"):
        assert [row.num_questions for row in compared({"m": own})] == [10, 10]


def test_eval_takes_both(make_task: Any, dense_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name = make_task("choice")
    files = f"{name},{Path(name).with_name('rows.jsonl')}"
    assert run_command(["eval", str(dense_models["llama"]), "--tokens", "64", "--tasks", files]) == 0
    said = capsys.readouterr()
    assert "choice.yaml, acc: 12 questions, 0.333 by chance" in said.out
    assert "rows.jsonl, acc_norm: 12 questions" in said.out
