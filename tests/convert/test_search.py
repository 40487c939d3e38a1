"""Choices under a budget: that they keep to it, spare what matters, and can be written."""

import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDense
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeify import strategies
from moeify.check.verify import verify
from moeify.cli.app import run_command
from moeify.cli.tables.search import search_tables
from moeify.cli.tables.split import LAYER_COLUMNS, layers_table
from moeify.convert import search_scores as budget_module
from moeify.convert.pipeline import split
from moeify.convert.prepare import prepare
from moeify.convert.preview import preview
from moeify.convert.search import FRONTIER, SearchResult, search, under_budget
from moeify.convert.search_layouts import SHARES, candidate_layouts
from moeify.errors import InputError, UsageError
from moeify.models.dense import open_dense
from moeify.options import SplitOptions
from moeify.plan import load_plan

# The package binds some names of modules to functions.
search_module = importlib.import_module("moeify.convert.search")

LAYERS = 4
SIZES: dict[str, Any] = {"num_hidden_layers": LAYERS, "intermediate_size": 128}

Find = Callable[..., SearchResult]
Plant = Callable[[int, float], Path]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Little check text, and no clocking of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "CHECK_TOKENS", 512)
        patch.setattr(search_module, "matmul_rate", lambda _: 1e10)
        yield


@pytest.fixture(scope="module")
def options(calibration_file: Path) -> SplitOptions:
    return SplitOptions(calibration=(str(calibration_file),), tokens=1024)


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", **SIZES)


@pytest.fixture(scope="module")
def plant(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Plant:
    """plant(layer, factor): the model with this layer's FFN `factor` times as loud and the others' as much quieter."""
    made: dict[tuple[int, float], Path] = {}

    @torch.no_grad()
    def scaled(layer: int, factor: float) -> Path:
        if (layer, factor) not in made:
            model = AutoModelForCausalLM.from_pretrained(dense)
            for number, block in enumerate(model.model.layers):
                block.mlp.down_proj.weight.mul_(factor if number == layer else 1 / factor)
            folder = tmp_path_factory.mktemp("planted")
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
            made[layer, factor] = folder
        return made[layer, factor]

    return scaled


@pytest.fixture(scope="module")
def find(dense: Path, options: SplitOptions) -> Find:
    """find(budget, model=the llama, **arguments of search)."""

    def call(budget: float, model: Path | None = None, **changed: Any) -> SearchResult:
        return search(str(model or dense), budget, options, **changed)

    return call


@pytest.fixture
def no_fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a layer was fitted")

    monkeypatch.setattr(budget_module, "fit_layer", fail)


@pytest.mark.parametrize("budget", [0.3, 0.625, 0.7, 0.9])
def test_a_choice_keeps_to_its_budget(dense: Path, options: SplitOptions, budget: float) -> None:
    chosen = under_budget(str(dense), replace(options, budget=budget))
    planned = preview(str(dense), replace(chosen, budget=None))
    assert planned.layout.dense_layers == chosen.dense_layers
    assert planned.layout.num_active == chosen.active
    assert planned.layout.model_share(LAYERS) <= budget + 1e-9
    # And uses it: no layer more could stay dense.
    one_more = len(chosen.dense_layers) + 1
    assert one_more / LAYERS + (1 - one_more / LAYERS) * planned.layout.active_share > budget


def test_the_point_that_was_found(find: Find) -> None:
    found = find(0.7)
    assert (found.budget, found.choice.strategy, found.uniform.strategy) == (0.7, "greedy", "uniform")
    for point in (found.choice, found.uniform, *found.frontier):
        gone = len(point.dropped_layers)
        assert point.share == pytest.approx(point.layout.model_share(LAYERS - gone, gone))
        assert point.share <= max(FRONTIER) + 1e-9
        assert point.divergence > 0
        assert math.isfinite(point.perplexity)
    assert found.uniform.layout.dense_layers == ()
    assert found.uniform.share == max(share for share in SHARES if share <= 0.7)
    assert found.options == {
        "experts": 8,
        "shared": found.choice.layout.num_shared,
        "active": found.choice.layout.num_active,
        "active_by_layer": (),
        "static_layers": (),
        "dense_layers": found.choice.layout.dense_layers,
        "drop_layers": found.choice.dropped_layers,
    }
    # What was summed up is in the table of single layers.
    layout = found.choice.layout
    losses = found.losses[f"{layout.num_active}/{layout.num_experts}"]
    cut = [loss for layer, loss in enumerate(losses) if layer not in layout.dense_layers]
    assert found.choice.predicted == pytest.approx(sum(cut))
    assert set(found.losses) == {
        *(f"{round(share * 8)}/8" for share in SHARES),
        "without the layer",
        "without its FFN",
    }
    assert all(len(row) == LAYERS for row in found.losses.values())


def test_active_parameters_are_those_of_the_written_model(dense: Path, options: SplitOptions, tmp_path: Path) -> None:
    found = search(str(dense), 0.7, options, frontier=False)
    written = split(str(dense), tmp_path / "out", replace(options, **found.options))
    assert written.layout == found.choice.layout
    assert written.num_active_parameters == found.choice.active_parameters


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_layer_that_matters_stays_dense(plant: Plant, find: Find, layer: int) -> None:
    """With a budget that leaves room for one."""
    found = find(0.55, plant(layer, 3.0), frontier=False)
    row = found.losses["4/8"]
    assert int(np.argmax(row)) == layer
    assert layer in found.choice.layout.dense_layers
    assert found.choice.divergence < found.uniform.divergence


def test_the_frontier_is_sorted(find: Find) -> None:
    found = find(0.65)
    shares = [point.share for point in found.frontier]
    assert shares == sorted(shares, reverse=True)
    # Two budgets may lead to the same choice, which then is there once.
    assert 1 < len(found.frontier) == len(set(found.frontier)) <= len({*FRONTIER, 0.65})
    assert {point.strategy for point in found.frontier} == {"greedy"}
    predicted = [point.predicted for point in found.frontier]
    assert predicted == sorted(predicted)
    assert find(0.65, frontier=False).frontier == ()
    # Budgets below the cheapest candidate are left out, whatever was asked for.
    assert all(share >= min(SHARES) for share in shares)


@pytest.mark.parametrize("strategy", sorted(set(strategies.names()) - {"uniform"}))
def test_every_strategy_keeps_to_the_budget(find: Find, strategy: str) -> None:
    found = find(0.7, strategy=strategy, trials=24, frontier=False)
    assert found.choice.strategy == strategy
    assert found.choice.share <= 0.7 + 1e-9
    assert find(0.7, strategy=strategy, trials=24, frontier=False) == found


def test_strategies_with_trials_measure(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    joints: list[Any] = []
    really = budget_module.OutputCheck.joint

    def counting(self: Any, layout: Any, plans: Any) -> Any:
        joints.append((layout.num_active, layout.dense_layers))
        return really(self, layout, plans)

    monkeypatch.setattr(budget_module.OutputCheck, "joint", counting)
    found = find(0.7, strategy="beam", trials=40, frontier=False)
    # Four layouts are affordable, and none of their choices is measured twice.
    assert 8 < len(joints) <= 40 + 1
    assert len(joints) == len(set(joints))
    seen = joints.copy()
    joints.clear()
    single = find(0.7, strategy="greedy", trials=1, frontier=False)
    assert len(joints) == 2
    assert found.choice.divergence <= single.choice.divergence
    assert (found.choice.layout.num_active, found.choice.layout.dense_layers) in seen


def test_an_expected_time_is_announced(plant: Plant, find: Find) -> None:
    lines: list[str] = []
    find(0.7, plant(0, 1.5), frontier=False, announce=lines.append)
    (line,) = lines
    assert re.fullmatch(r"the search will take about \d+ (s|min)", line)


def test_a_second_search_scores_nothing(find: Find, request: pytest.FixtureRequest) -> None:
    """Another budget or strategy uses the same scores."""
    first = find(0.7, frontier=False)
    request.getfixturevalue("no_fitting")
    assert find(0.7, frontier=False) == first
    find(0.85, strategy="beam", frontier=False)


def test_another_job_has_its_own_scores(
    dense: Path, options: SplitOptions, find: Find, request: pytest.FixtureRequest
) -> None:
    find(0.7, frontier=False)
    request.getfixturevalue("no_fitting")
    changes: list[dict[str, Any]] = [{"seed": 1}, {"refit": False}, {"partition": "random"}, {"experts": 4}]
    for changed in changes:
        with pytest.raises(AssertionError, match="a layer was fitted"):
            search(str(dense), 0.7, replace(options, **changed), frontier=False)


@pytest.mark.parametrize("budget", [0, 1, -0.5, 1.5, math.nan])
def test_a_budget_out_of_range(find: Find, budget: float) -> None:
    with pytest.raises(UsageError, match="out of range"):
        find(budget)


def test_a_budget_that_no_candidate_meets_is_refused_first(find: Find, no_fitting: None, plant: Plant) -> None:
    with pytest.raises(UsageError, match=r"keeps 0\.25 of the FFN active, the budget is 0\.2"):
        find(0.2, plant(0, 1.25))


@pytest.mark.parametrize(
    "changed",
    [
        {"plan": "some/plan"},
        {"static": True, "active": 4},
        {"active": 4},
        {"active_by_layer": (4, 4, 4)},
        {"shared": 1},
        {"dense_layers": (0,)},
        {"drop_layers": (0,)},
        {"mixing": "soft"},
    ],
    ids=str,
)
def test_options_that_a_budget_decides(dense: Path, options: SplitOptions, tmp_path: Path, changed: Any) -> None:
    with pytest.raises(UsageError, match="budget"):
        search(str(dense), 0.7, replace(options, **changed))
    with pytest.raises(UsageError, match="budget"):
        split(str(dense), tmp_path / "out", replace(options, budget=0.7, **changed))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_strategy(find: Find) -> None:
    with pytest.raises(UsageError, match="wish"):
        find(0.7, strategy="wish")


def test_a_context_that_leaves_nothing_to_fit_to(make_dense: MakeDense, options: SplitOptions) -> None:
    model = make_dense("llama", **{**SIZES, "max_position_embeddings": 4096})
    with pytest.raises(InputError, match="leave none to fit to"):
        search(str(model), 0.7, replace(options, context=1024))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "seed_oss"])
@pytest.mark.parametrize("experts", [4, 8])
def test_whatever_is_offered_can_be_written(
    make_dense: MakeDense, options: SplitOptions, family: str, experts: int
) -> None:
    """Some targets hold only the first layers dense, or no layout without shared experts."""
    model = open_dense(make_dense(family, **SIZES))
    options = replace(options, experts=experts)
    layouts = candidate_layouts(search_module._prepared(model, options), 0.75)
    assert len(layouts) > 1
    for layout in (one for one in layouts if not one.is_static):
        for dense_layers in ((), (0,), (3,), (1, 3)):
            wanted = replace(layout, dense_layers=dense_layers)
            changed = {"active": wanted.num_active, "shared": wanted.num_shared, "dense_layers": dense_layers}
            assert prepare(model, replace(options, **changed)).layout == wanted


def test_a_split_under_a_budget(plant: Plant, options: SplitOptions, tmp_path: Path) -> None:
    model, out = plant(2, 3.0), tmp_path / "out"
    result = split(str(model), out, replace(options, budget=0.7))
    assert result.target == "qwen2_moe"
    assert 2 in result.layout.dense_layers
    assert result.layout.model_share(LAYERS) <= 0.7 + 1e-9
    assert json.loads((out / "config.json").read_text())["mlp_only_layers"] == list(result.layout.dense_layers)
    assert load_plan(out).layout == result.layout
    report = verify(str(out), str(model))
    assert report.passed, report.checks


def test_a_place_that_is_taken_is_found_before_the_search(
    plant: Plant, options: SplitOptions, tmp_path: Path, no_fitting: None
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="exists"):
        split(str(plant(0, 2.5)), tmp_path / "out", replace(options, budget=0.7))


def test_a_dry_run_cannot_show_a_budget(dense: Path, options: SplitOptions) -> None:
    with pytest.raises(UsageError, match="budget"):
        preview(str(dense), replace(options, budget=0.7))


@pytest.fixture(scope="module")
def flags(options: SplitOptions) -> list[str]:
    return ["--calibration", options.calibration[0], "--tokens", "1024", "--experts", "8"]


def test_the_command_prints_one_object(
    dense: Path, flags: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capfd.readouterr()
    command = ["search", str(dense), *flags, "--budget", "0.7", "-o", str(tmp_path / "found.json"), "--json"]
    assert run_command(command) == 0
    out, _ = capfd.readouterr()
    found = json.loads(out)
    assert found["schema"] == "moeify.search/1"
    assert found["choice"]["strategy"] == "greedy"
    assert found["choice"]["share"] <= 0.7 + 1e-9
    assert 1 < len(found["frontier"]) <= len({*FRONTIER, 0.7})
    # The same schema, so the same keys.
    assert found == json.loads((tmp_path / "found.json").read_text())


def test_the_tables_of_the_command(dense: Path, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert run_command(["search", str(dense), *flags, "--budget", "0.7"]) == 0
    out, err = capfd.readouterr()
    assert "the search will take about" in err
    assert "uniform" in out
    assert "frontier" in out
    last = out.splitlines()[-1]
    assert last.startswith("next: moeify split ")
    # The command that it names works.
    arguments = last.removeprefix("next: moeify ").split()
    assert run_command([*arguments, "--dry-run", "--quiet"]) == 0


def test_quiet_says_the_result_alone(dense: Path, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert run_command(["search", str(dense), *flags, "--budget", "0.7", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert "uniform" in out
    assert "next:" not in out + err


def test_the_tables_show_every_point(find: Find) -> None:
    result = find(0.7)
    choices, frontier = search_tables(result)
    assert choices.row_count == 3
    assert "static by depth" in list(choices.columns[0].cells)
    assert frontier.row_count == len(result.frontier)
    assert len(search_tables(find(0.7, frontier=False))) == 1


def test_a_split_reports_one_row_a_layer(
    dense: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["split", str(dense), *flags, "--budget", "0.7"]
    assert run_command([*command, "-o", str(tmp_path / "plain")]) == 0
    plain, err = capfd.readouterr()
    assert "gain" not in plain
    assert "the search will take about" in err
    assert run_command([*command, "--report", "-o", str(tmp_path / "out")]) == 0
    out, _ = capfd.readouterr()
    plan = load_plan(tmp_path / "out")
    rows = [line for line in out.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    # At 80 columns a table of ten figures is cut into two.
    assert len(rows) == 2 * LAYERS
    for row in rows:
        assert ("dense" in row) == (int(row.split()[0]) in plan.layout.dense_layers)


def test_the_table_of_layers_shows_what_was_measured(dense: Path, options: SplitOptions, tmp_path: Path) -> None:
    plan = split(str(dense), tmp_path / "out", replace(options, dense_layers=(2,))).plan
    table = layers_table(plan)
    assert table.row_count == LAYERS
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == [str(layer) for layer in range(LAYERS)]
    for name, cells in zip(LAYER_COLUMNS, columns[1:], strict=True):
        for layer, cell in enumerate(cells):
            expected = plan.layers[layer].diagnostics.get(name)
            assert cell == ("dense" if layer == 2 else "" if expected is None else f"{expected:.3f}"), (name, layer)


def test_the_options_of_a_search_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noting(model: str, budget: float, options: SplitOptions, **arguments: Any) -> None:
        seen.append((model, budget, options, arguments["strategy"], arguments["trials"]))
        raise InputError("enough", "seen")

    monkeypatch.setattr(importlib.import_module("moeify.convert.search"), "search", noting)
    values: dict[str, Any] = {
        "experts": 16,
        "min_active": 4,
        "max_active": 12,
        "target": "moeify",
        "partition": "kmeans",
        "router": "centroid",
        "tokens": 2048,
        "context": 32,
        "seed": 7,
        "dtype": "bfloat16",
        "device": "cuda:1",
    }
    command = [
        "search",
        "some/model",
        "--budget",
        "0.6",
        "--strategy",
        "beam",
        "--trials",
        "5",
        "--calibration",
        "a",
    ]
    for name, value in values.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    assert run_command(command) == 3
    assert seen == [("some/model", 0.6, SplitOptions(calibration=("a",), **values), "beam", 5)]
    assert run_command(["search", "some/model"]) == 3
    assert seen[1][2] == SplitOptions()
