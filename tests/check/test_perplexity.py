"""One text has one perplexity, whichever command measures it; one of a handful of tokens is called rough."""

import importlib
from pathlib import Path

import pytest
import torch
from conftest import MakeDense

from moeify.benchmark.models.inputs import Texts, open_models
from moeify.benchmark.models.quality import measure_quality
from moeify.benchmark.options import BenchOptions
from moeify.check.evaluate import evaluate, load
from moeify.check.perplexity import whole_blocks
from moeify.cli.app import run_command
from moeify.convert.pipeline import split
from moeify.errors import InputError, MoeifyWarning
from moeify.options import CompareOptions, EvalOptions, SplitOptions

compare = importlib.import_module("moeify.check.compare").compare


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=128)


def test_eval_compare_and_bench_give_one_number(dense: Path, tmp_path: Path) -> None:
    """With their defaults, on the same text."""
    options = SplitOptions(tokens=2048)
    pruned = str(split(str(dense), tmp_path / "pruned", SplitOptions(tokens=2048, static=True)).out)
    (result,) = evaluate([str(dense)])
    compared = compare(str(dense), [0.5], EvalOptions.data, options, only=["static"]).rows[0]
    assert compared.method == "dense"
    texts = Texts.of(open_models([pruned], [str(dense)], lambda items, *_: iter(items)), BenchOptions())
    (measured,) = measure_quality({"dense": load(str(dense))}, "dense", texts.blocks)
    assert measured.num_tokens == result.num_tokens == 8192 // 64 * 63
    assert [compared.value, measured.perplexity] == pytest.approx([result.perplexity] * 2, rel=1e-4)


def test_the_defaults_are_the_same() -> None:
    assert EvalOptions.tokens == BenchOptions.tokens == CompareOptions.data_tokens == 8192
    assert EvalOptions.data == BenchOptions.data == CompareOptions.data


def test_blocks_are_whole() -> None:
    ids_T = torch.arange(10)
    assert whole_blocks("text", ids_T, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(InputError, match="text gives 10 tokens, less than 3 blocks of 4"):
        whole_blocks("text", ids_T, 4, least=3)


@pytest.mark.parametrize(("tokens", "rough"), [(64, True), (1015, True), (1024, False)])
def test_a_handful_of_tokens_gives_a_warning(
    tokens: int, rough: bool, dense: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["eval", str(dense), "--tokens", str(tokens)]) == 0
    out, err = capfd.readouterr()
    assert ("warning: " in err) == rough
    assert (f"{tokens // 64 * 63} tokens of builtin-heldout give a rough perplexity" in err) == rough
    assert "perplexity" in out


def test_python_warns_as_well(dense: Path) -> None:
    with pytest.warns(MoeifyWarning, match="63 tokens of builtin-heldout give a rough perplexity"):
        evaluate([str(dense)], tokens=64)
