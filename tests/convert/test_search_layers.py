"""A budget for moeify's own architecture: every layer has as many active experts as it is worth."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify.check.verify import verify
from moeify.convert.pipeline import split
from moeify.convert.prepare import prepare
from moeify.convert.search import SearchResult, search
from moeify.convert.search_alike import layout_as_needed
from moeify.convert.search_points import Point
from moeify.layout import Layout
from moeify.models.dense import open_dense
from moeify.options import SplitOptions

LOUD = 1
OPTIONS = SplitOptions(
    experts=8, target="moeify", tokens=1024, context=64, calibration=("builtin",), partition="energy", refit=False
)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Little check text, and no clocking of this machine."""
    search_module = importlib.import_module("moeify.convert.search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "CHECK_TOKENS", 256)
        patch.setattr(search_module, "matmul_rate", lambda _: 1e10)
        yield


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A llama of four layers, one of whose FFNs says more than the others."""
    source, folder = make_dense("llama", num_hidden_layers=4), tmp_path_factory.mktemp("loud")
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.mul_(3.0 if number == LOUD else 0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def result(dense: str) -> SearchResult:
    return search(dense, 0.5, OPTIONS, depth=False, frontier=False)


def test_layers_share_the_budget_by_what_they_lose(result: SearchResult) -> None:
    layout = result.choice.layout
    counts = layout.active_by_layer
    assert len(set(counts)) > 1
    assert counts[LOUD] == max(counts) > layout.num_active
    assert result.choice.share == pytest.approx(sum(counts) / 8 / len(counts))
    # One expert more in a layer would not fit.
    assert 0.5 - 1 / 32 < result.choice.share <= 0.5 + 1e-9
    assert result.choice.predicted < result.uniform.predicted
    assert result.options["active"] is None
    assert result.uniform.layout.active_by_layer == ()


def test_what_is_chosen_is_written(result: SearchResult, dense: str, tmp_path: Path) -> None:
    written = split(dense, tmp_path / "out", OPTIONS, budget=0.5)
    assert written.layout == result.choice.layout
    assert written.num_active_parameters == result.choice.active_parameters
    assert written.plan.options.active_by_layer == result.choice.layout.active_by_layer
    assert verify(str(tmp_path / "out"), dense).passed


def test_a_range_of_experts_bounds_what_layers_may_have(dense: str) -> None:
    layout = search(dense, 0.5, OPTIONS, depth=False, frontier=False, min_active=3, max_active=5).choice.layout
    assert (layout.min_active, layout.max_active) == (3, 5)
    assert set(layout.cut_counts) <= {3, 4, 5}


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_what_tokens_need_is_taken_if_it_loses_less(
    factor: float, result: SearchResult, dense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = result.as_needed
    assert needs is not None
    assert needs.layout.is_adaptive
    # Counted on the check text, whose tokens tell thresholds apart to one score.
    assert needs.share == pytest.approx(0.5, abs=0.01)
    by_layer = result.choice if result.choice != needs else result.uniform
    better = replace(needs, divergence=by_layer.divergence * factor)
    search_module = importlib.import_module("moeify.convert.search")
    monkeypatch.setattr(search_module, "points_alike", lambda *_, **__: [better])
    lines: list[str] = []
    again = search(dense, 0.5, OPTIONS, depth=False, frontier=False, announce=lines.append)
    assert (again.choice == better) == (factor < 1)
    (said,) = [line for line in lines if "loses less than" in line]
    assert said.startswith("as many experts as a token needs") == (factor < 1)
    assert f"{better.divergence:.4f}" in said
    if factor < 1:
        layout = again.choice.layout
        assert (layout.num_active, layout.min_active, layout.max_active) == (4, 2, 8)
        chosen = replace(OPTIONS, **again.options)
        assert (chosen.active, chosen.min_active, chosen.max_active) == (4, 2, 8)


def test_a_clear_win_of_what_tokens_need_ends_a_quick_search(
    result: SearchResult, dense: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_module = importlib.import_module("moeify.convert.search")
    real, layouts = search_module.points_alike, []

    def clear(*arguments: Any, **named: Any) -> list[Point]:
        needs, alike = real(*arguments, **named)
        layouts.extend([needs.layout, alike.layout])
        return [replace(needs, divergence=0.6 * alike.divergence), alike]

    monkeypatch.setattr(search_module, "points_alike", clear)
    monkeypatch.setattr(search_module, "score", None)
    quick = search(dense, 0.5, OPTIONS, depth=False, frontier=False, quick=True)
    assert layouts[0] == replace(layouts[1], min_active=2, max_active=8)
    assert quick.choice.layout == layouts[0]
    assert quick.dense_perplexity == pytest.approx(result.dense_perplexity)


@pytest.mark.parametrize("changes", [{"target": "qwen2_moe"}, {"max_active": 6}, {"mixing": "softmax"}])
def test_stock_architectures_and_a_given_range_have_no_such_candidate(changes: dict[str, Any], dense: str) -> None:
    def needs(**changes: Any) -> Layout | None:
        return layout_as_needed(prepare(open_dense(dense), replace(OPTIONS, **changes)), 0.5)

    assert needs() == Layout(8, 1, 4, min_active=2, max_active=8)
    assert needs(**changes) is None
