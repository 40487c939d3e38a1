"""Every model is measured by its own job: encoders by what they guess, by their features and by labelled sets."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from moeify.check import pseudo_perplexity
from moeify.check.compare import compare
from moeify.check.evaluate import evaluate, measure
from moeify.check.features import features
from moeify.check.labels import fit_probe
from moeify.check.verify import verify
from moeify.cli.app import app
from moeify.convert.pipeline import split
from moeify.convert.search import search
from moeify.data.examples import text_examples
from moeify.errors import InputError, UsageError
from moeify.models.heads import classes_of_type
from moeify.options import EvalOptions, SplitOptions

# Short texts and small sets are warned of, and enough here.
pytestmark = pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
CLASSES = ("animal", "number", "weather")
WORDS = {
    "animal": ["the", "cat", "and", "the", "dog", "and", "the", "mouse"],
    "number": ["one", "two", "three", "seven", "ninety", "forty"],
    "weather": ["rain", "and", "sun", "and", "snow", "and", "wind"],
}


@pytest.fixture(scope="module")
def made(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """made(class name, family) -> folder of a tiny bert with a tokenizer that has a mask."""
    folders: dict[str, Path] = {}

    def make(name: str, family: str = "bert", **values: Any) -> Path:
        if name not in folders:
            folder = make_dense(family, architectures=[name], vocab_size=512, **values)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_special_tokens({"mask_token": "<mask>"})
            tokenizer.save_pretrained(folder)
            folders[name] = folder
        return folders[name]

    return make


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("topics") / "topics.csv"
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["text", "label"])
        for number in range(60):
            label = CLASSES[number % 3]
            words = [WORDS[label][int(i)] for i in torch.randint(6, (int(6 + number % 4),), generator=generator)]
            rows.writerow([" ".join(words), label])
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(f"line {number} of {number * 7} things" for number in range(200)))
    return str(file)


def test_each_token_is_guessed_from_all_others(made: Any, text: str) -> None:
    folder = made("BertForMaskedLM")
    (found,) = evaluate([folder], [text], tokens=40, context=20)
    assert found.measure == "pseudo-perplexity"
    # One of 20 is the token that the tokenizer puts in front.
    assert found.num_tokens == 38
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    losses = []
    for example in text_examples(folder, text, 40, 20)[0]:
        for place, right in list(enumerate(example["input_ids"][0]))[1:]:
            masked = example["input_ids"].clone()
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                losses.append(cross_entropy(model(masked).logits[0, place], right))
    assert found.perplexity == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-4)


def test_of_a_longer_text_a_sample_is_guessed_which_no_special_token_is_in() -> None:
    ids_BC = torch.zeros(300, 12, dtype=torch.int64)
    rows_P, places_P = pseudo_perplexity.sample(ids_BC, 1, 2)
    assert len(rows_P) == pseudo_perplexity.PLACES
    assert len({*zip(rows_P.tolist(), places_P.tolist(), strict=True)}) == len(rows_P)
    assert (places_P.min(), places_P.max(), rows_P.max() < 300) == (1, 9, True)


def test_an_encoder_goes_the_whole_road(made: Any, text: str, topics: Path, tmp_path: Path) -> None:
    dense, out = made("BertModel"), tmp_path / "out"
    split(str(dense), out, SplitOptions(experts=8, active=4, tokens=1024, calibration=("builtin",)))
    report = verify(out, str(dense))
    assert report.passed, report.checks
    options = EvalOptions((text,), tokens=256, tasks=(str(topics),))
    found = measure([str(dense), str(out)], options)
    own, cut = found.scores
    assert (own.measure, own.value) == ("feature cosine", pytest.approx(1.0))
    assert 0 < cut.value < 1 - 1e-6
    examples = text_examples(dense, text, 256, None)[0]
    with torch.no_grad():
        parts = [
            [model(**one).last_hidden_state.mean(dim=1)[0] for one in examples]
            for model in (AutoModel.from_pretrained(folder).eval() for folder in (dense, out))
        ]
    by_hand = cosine_similarity(torch.stack(parts[0]), torch.stack(parts[1])).mean()
    assert cut.value == pytest.approx(float(by_hand), abs=1e-5)
    scores = {(one.model, one.metric): one for one in found.tasks}
    assert {metric for _, metric in scores} == {"probe", "own probe", "agreement", "cosine"}
    assert scores[str(dense), "agreement"].score == 1
    # Different words: any features tell them apart.
    assert scores[str(dense), "probe"].score > 0.9
    assert scores[str(out), "own probe"].score > 0.9
    assert scores[str(dense), "probe"].num_questions == 12


def test_a_head_is_carried_and_measured(made: Any, topics: Path, text: str, tmp_path: Path) -> None:
    names = {"id2label": dict(enumerate(CLASSES[::-1])), "label2id": {name: 2 - i for i, name in enumerate(CLASSES)}}
    dense, out = made("BertForSequenceClassification", **names), tmp_path / "out"
    split(str(dense), out, SplitOptions(experts=8, active=4, tokens=1024, calibration=("builtin",)))
    assert verify(out, str(dense)).passed
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.id2label == names["id2label"]
    found = measure([str(dense), str(out)], EvalOptions((text,), tokens=128, tasks=(str(topics),)))
    scores = {(one.model, one.metric): one.score for one in found.tasks}
    assert {metric for _, metric in scores} == {"accuracy", "agreement"}
    # By hand, on the same fifth.
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:12]
    rows = list(csv.DictReader(topics.read_text().splitlines()))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    stock = AutoModelForSequenceClassification.from_pretrained(dense).eval()
    right = 0
    for number in order.tolist():
        with torch.no_grad():
            place = int(stock(**tokenizer(rows[number]["text"], return_tensors="pt")).logits.argmax())
        right += names["id2label"][place] == rows[number]["label"]
    assert scores[str(dense), "accuracy"] == pytest.approx(right / 12)
    # A head that was changed is found.
    file = out / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": {"0": "a", "1": "b", "2": "c"}}))
    failed = [check.name for check in verify(out, str(dense)).checks if not check.passed]
    assert failed == ["config is the plan's", "architecture is the dense model's"]


@pytest.mark.parametrize("family", ["distilbert", "electra", "modernbert", "roberta"])
def test_masked_models_of_every_kind_go_in(family: str, made: Any, calibration_file: Path, tmp_path: Path) -> None:
    (name,) = classes_of_type("AutoModelForMaskedLM", family)
    dense = made(name, family)
    options = SplitOptions(experts=8, active=4, tokens=1024, calibration=(str(calibration_file),))
    assert split(str(dense), tmp_path / "out", options).target == "moeify"
    report = verify(tmp_path / "out", str(dense))
    assert report.passed, report.checks


def test_a_classifier_of_a_language_model_becomes_a_stock_one(
    make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    dense, out = make_dense("llama", architectures=["LlamaForSequenceClassification"]), tmp_path / "out"
    text = {"tokens": 1024, "calibration": (str(calibration_file),)}
    split(str(dense), out, SplitOptions(experts=8, active=4, shared=0, target="mixtral", **text))
    assert verify(out, str(dense)).passed
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model).__name__ == "MixtralForSequenceClassification"


def test_methods_and_layers_are_compared_by_features(made: Any, text: str, topics: Path) -> None:
    dense = str(made("BertModel"))
    options = SplitOptions(experts=4, tokens=1024, calibration=("builtin",), context=32)
    found = compare(dense, 0.5, [text], options, tokens=128, only=["CMoE"])
    rows = {row.method: row for row in found.rows}
    assert found.measure == "feature error"
    assert rows["dense"].value == pytest.approx(0, abs=1e-6)
    assert rows["static + refit"].ratio == pytest.approx(1)
    assert 0 < rows["CMoE"].value < 1
    with pytest.raises(UsageError, match="labelled set"):
        compare(dense, 0.5, [text], options, tasks=[str(topics)])
    result = search(dense, 0.75, SplitOptions(experts=4, tokens=1024, calibration=("builtin",), context=32))
    assert math.isnan(result.dense_perplexity)
    assert 0 < result.choice.divergence < 1


def test_what_no_encoder_does_is_refused(made: Any, make_dense: MakeDense, text: str, tmp_path: Path) -> None:
    base, masked = str(made("BertModel")), str(made("BertForMaskedLM"))
    with pytest.raises(InputError, match="AutoModelForMaskedLM"):
        evaluate([base, masked], [text], tokens=64)
    with pytest.raises(InputError, match="writes nothing of its own for the source self"):
        split(base, tmp_path / "out", SplitOptions(experts=4, tokens=1024, calibration=("self",)))
    with pytest.raises(InputError, match="no mask token"):
        evaluate([make_dense("bert", architectures=["BertForMaskedLM"])], [text], tokens=64)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}\n' * 2)
    with pytest.raises(InputError, match="needs a language model"):
        measure([base], EvalOptions((text,), tokens=64, tasks=(str(questions),)))


def test_the_tables(made: Any, text: str, topics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(made("BertModel"))
    app(["eval", model, "--data", text, "--tokens", "64", "--tasks", str(topics)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "feature cosine" in printed
    assert "own probe" in printed


def test_features_keep_the_order_of_the_examples(made: Any) -> None:
    model = AutoModel.from_pretrained(made("BertModel")).eval()
    examples = [{"input_ids": torch.arange(3, 3 + size)[None]} for size in (4, 9, 4, 2, 9)]
    found = features(model, examples)
    for row, example in zip(found, examples, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row, model(**example).last_hidden_state.mean(dim=1)[0], rtol=1e-4, atol=1e-5)


def test_a_probe_of_what_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        fit_probe(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), torch.tensor([0, 1]))
