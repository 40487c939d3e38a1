"""Perplexity with a sliding window equals a loop over tokens; what cannot be compared is refused."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file

from moeify.check.evaluate import evaluate, load
from moeify.check.perplexity import _windows
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError, MoeifyError, UsageError
from moeify.models.builtin import BuiltinRecipe, train_tokenizer

# (tokens, context, stride): half a window, all but one token, one, all of it; one window, a short one, odd ones.
SETTINGS = [
    (200, 32, 16),
    (201, 32, 31),
    (65, 64, 1),
    (200, 32, 32),
    (64, 64, 64),
    (40, 64, 32),
    (100, 16, 5),
    (2, 16, 8),
    (33, 2, 1),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, calibration_file: Path) -> str:
    path = tmp_path_factory.mktemp("eval") / "text.txt"
    path.write_text(calibration_file.read_text()[:2000])
    return str(path)


@torch.no_grad()
def naive(folder: Path, ids_T: torch.Tensor, context: int, stride: int) -> tuple[float, int]:
    """Perplexity and number of scored tokens: one after the other, each with what its window holds before it."""
    model = load(str(folder))
    loss, count = 0.0, 0
    if stride == context <= len(ids_T):
        # Blocks are whole.
        ids_T = ids_T[: len(ids_T) // context * context]
    for position in range(1, len(ids_T)):
        # The first window that reaches the token: windows begin at multiples of the stride.
        start = 0
        while position >= start + context:
            start += stride
        if start == position:
            continue
        logits_V = model(ids_T[None, start:position], use_cache=False).logits[0, -1].double()
        loss -= float(logits_V.log_softmax(-1)[ids_T[position]])
        count += 1
    return math.exp(loss / count), count


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_perplexity_equals_a_loop_over_tokens(
    setting: tuple[int, int, int], dense_models: dict[str, Path], text: str, tokenizer: Any
) -> None:
    tokens, context, stride = setting
    folder = dense_models["llama"]
    ids_T = evaluation_tokens(text, tokenizer, num_tokens=tokens).ids_T
    (found,) = evaluate([str(folder)], [text], tokens=tokens, context=context, stride=stride)
    perplexity, count = naive(folder, ids_T, context, stride)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.num_tokens == count
    assert len(ids_T) == tokens


@pytest.mark.parametrize(("tokens", "context", "stride"), SETTINGS)
def test_each_token_is_scored_once_with_enough_before_it(tokens: int, context: int, stride: int) -> None:
    scored = []
    for start, end, first in _windows(tokens, context, stride):
        assert 0 <= start < first < end <= tokens
        assert end - start <= context
        assert first == 1 or first - start >= context - stride
        scored += range(first, end)
    # Of blocks that only touch, the first token has nothing before it, and the last one is whole.
    end = tokens // context * context if stride == context <= tokens else tokens
    assert scored == [position for position in range(1, end) if stride < context or position % stride]


def test_the_setting_matters(dense_models: dict[str, Path], text: str) -> None:
    """Less context is another number, so the equalities above are not of a constant."""
    folder = str(dense_models["llama"])
    values = [evaluate([folder], [text], tokens=200, context=c, stride=c - 1)[0].perplexity for c in (8, 16, 64)]
    assert len({round(value, 2) for value in values}) == 3


def test_defaults_are_blocks_of_the_models_context(dense_models: dict[str, Path], text: str) -> None:
    folder = str(dense_models["llama"])
    (default,) = evaluate([folder], [text], tokens=300)
    (spelled,) = evaluate([folder], [text], tokens=300, context=64, stride=64)
    assert default == replace(spelled, tokens_per_second=default.tokens_per_second)
    assert (default.num_tokens, default.context, default.stride) == (4 * 63, 64, 64)


def test_results_come_model_by_model_and_text_by_text(dense_models: dict[str, Path], text: str) -> None:
    models = [str(dense_models["llama"]), str(dense_models["qwen3"])]
    data = [text, "builtin-heldout"]
    found = evaluate(models, data, tokens=100, context=32)
    assert [(result.model, result.data) for result in found] == [(m, d) for m in models for d in data]
    assert found[0].perplexity != found[2].perplexity
    assert found[0].sha256 == found[2].sha256
    assert all(result.tokens_per_second > 0 for result in found)
    assert len({result.perplexity for result in found}) == 4


def test_the_same_model_twice_gives_the_same_number(dense_models: dict[str, Path], text: str) -> None:
    folder = str(dense_models["mistral"])
    first, second = evaluate([folder, folder], [text], tokens=150, context=32)
    assert first.perplexity == second.perplexity


def test_the_dtype_is_the_checkpoints_unless_asked_for(make_dense: MakeDense, text: str) -> None:
    folder = str(make_dense("llama", dtype="bfloat16"))
    assert load(folder).dtype == torch.bfloat16
    assert load(folder, dtype="float32").dtype == torch.float32
    low, high = (evaluate([folder], [text], tokens=150, dtype=dtype)[0].perplexity for dtype in ("auto", "float32"))
    assert low != high
    assert low == pytest.approx(high, rel=0.05)


def test_models_with_other_tokens_are_not_compared(
    make_dense: MakeDense, text: str, tmp_path: Path, dense_models: dict[str, Path]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense_models["llama"], other)
    train_tokenizer(BuiltinRecipe(vocab_size=300, context=64), ["a b c d e f"] * 3).save_pretrained(other)
    with pytest.raises(InputError, match="different tokens") as caught:
        evaluate([str(dense_models["llama"]), str(other)], [text], tokens=100)
    assert "other" in str(caught.value)
    assert "text.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"context": 65}, InputError, "context 65 is longer than the 64 tokens"),
        ({"context": 32, "stride": 33}, InputError, "stride 33 does not fit a context of 32"),
        ({"context": 32, "stride": -1}, UsageError, "--stride -1 is out of range"),
        ({"context": 1}, UsageError, "--context 1 is out of range"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    values: dict[str, int], kind: type[MoeifyError], message: str, dense_models: dict[str, Path], text: str
) -> None:
    with pytest.raises(kind, match=message):
        evaluate([str(dense_models["llama"])], [text], tokens=100, **values)


def test_models_of_several_kinds_are_not_compared(dense_models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="models of image and text stand side by side"):
        evaluate([str(dense_models["llama"]), str(dense_models["vit"])])


def test_the_shortest_context_of_several_models_counts(make_dense: MakeDense, text: str) -> None:
    short, long = str(make_dense("llama", max_position_embeddings=32)), str(make_dense("llama"))
    with pytest.raises(InputError, match="the 32 tokens that all models take"):
        evaluate([long, short], [text], tokens=100, context=64)
    default = evaluate([long, short], [text], tokens=100)
    assert default[0].perplexity == evaluate([long], [text], tokens=100, context=32)[0].perplexity


def test_a_text_of_one_token_is_refused(dense_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(InputError, match="at least 2"):
        evaluate([str(dense_models["llama"])], [str(tmp_path / "short.txt")])


def test_overflow_is_infinite_not_an_error(dense_models: dict[str, Path], text: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense_models["llama"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (found,) = evaluate([str(broken)], [text], tokens=100)
    assert found.perplexity == math.inf


def test_loading_what_is_no_model_says_so(tmp_path: Path, dense_models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load(str(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(dense_models["llama"] / "config.json", bare)
    with pytest.raises(InputError, match="bare"):
        load(str(bare))
