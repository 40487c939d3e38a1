"""Layers that go: written, verified, chosen under a budget, compared; and layers that go beside cut ones."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, MakeDense
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moeify.check.compare import compare
from moeify.check.compare_entries import DENSE
from moeify.check.methods import REFERENCE
from moeify.check.verify import verify
from moeify.convert import depth
from moeify.convert.depth import choose_absent
from moeify.convert.pipeline import split
from moeify.convert.prepare import prepare
from moeify.convert.search import search
from moeify.convert.search_points import Points
from moeify.convert.search_scores import Absent, OutputChange, OutputCheck, ScoredLayer
from moeify.convert.texts import calibration_text
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError, UsageError
from moeify.layout import Layout
from moeify.models.dense import open_dense
from moeify.options import SplitOptions, untracked
from moeify.plan import load_plan
from moeify.training.finetune import finetune

LAYERS = 4


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("moeify.convert.search"), "CHECK_TOKENS", 256)
        patch.setattr(importlib.import_module("moeify.convert.search"), "matmul_rate", lambda _: 1e10)
        patch.setattr(depth, "DEPTH_TOKENS", 256)
        yield


@pytest.fixture(scope="module")
def options(calibration_file: Path) -> SplitOptions:
    return SplitOptions(experts=8, calibration=(str(calibration_file),), tokens=1024)


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 2 hardly do anything, of layer 3 the FFN alone does not."""
    folder = make_dense("llama", num_hidden_layers=LAYERS, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in (1, 2, 3):
            model.model.layers[layer].mlp.down_proj.weight.mul_(0.01 * layer)
        for layer in (1, 2):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(0.01)
    quiet = tmp_path_factory.mktemp("quiet")
    model.save_pretrained(quiet)
    AutoTokenizer.from_pretrained(folder).save_pretrained(quiet)
    return quiet


def test_a_split_without_a_layer_is_verified(dense: Path, options: SplitOptions, tmp_path: Path) -> None:
    """Layers are numbered as in the dense model, and in the result without those that went."""
    out = tmp_path / "out"
    result = split(str(dense), out, replace(options, drop_layers=(1,), dense_layers=(3,)))
    config = AutoConfig.from_pretrained(out)
    assert (config.num_hidden_layers, result.layout.dense_layers) == (3, (2,))
    plan = load_plan(out)
    assert (plan.options.drop_layers, plan.options.dense_layers) == ((1,), (3,))
    report = verify(out, str(dense))
    assert report.passed, report.checks
    assert "layers 1, with their attention, are gone" in (out / "README.md").read_text()
    # The plan says again what goes.
    again = split(str(dense), tmp_path / "again", SplitOptions(plan=str(out), refit=False))
    assert again.layout == result.layout
    assert verify(tmp_path / "again", str(dense)).passed
    # Each kept layer has its own dense one for a teacher.
    tuned = finetune(out, str(dense), tmp_path / "tuned", tokens=512, layer_tokens=512, stage=["layers"])
    assert tuned.stages[0].after["layer_error"] <= tuned.stages[0].before["layer_error"]
    assert verify(tmp_path / "tuned", str(dense)).passed


def test_verify_finds_another_layer_gone(dense: Path, options: SplitOptions, tmp_path: Path) -> None:
    split(str(dense), tmp_path / "out", replace(options, drop_layers=(0,)))
    plan = load_plan(tmp_path / "out")
    file = tmp_path / "out" / "split_plan.safetensors"
    replace(plan, options=replace(plan.options, drop_layers=(1,))).save(file)
    failed = [check.name for check in verify(tmp_path / "out", str(dense)).checks if not check.passed]
    assert "gate and up rows are the dense ones" in failed
    assert "logits equal dense, all experts on" in failed


def test_a_budget_of_a_static_model_drops_whole_layers(dense: Path, options: SplitOptions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = split(str(dense), out, replace(options, experts=None, static=True, budget=0.6))
    assert load_plan(out).options.drop_layers == (1, 2)
    assert result.layout.is_whole
    short, whole = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, dense))
    assert len(short.model.layers) == 2
    for kept, layer in zip(short.model.layers, (0, 3), strict=True):
        original = whole.model.layers[layer].state_dict()
        assert all(torch.equal(tensor, original[name]) for name, tensor in kept.state_dict().items())
    ids = torch.randint(3, 300, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (short(ids).logits - whole(ids).logits).abs().max() / whole(ids).logits.abs().max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"drop_layers": (0, 1, 2, 3)}, "all 4 layers"),
        ({"drop_layers": (9,)}, "no layer 9"),
        ({"drop_layers": (1,), "dense_layers": (1,)}, "to stay dense and to go"),
        ({"drop_layers": (1,), "dense_layers": (0, 2, 3)}, "nothing is cut"),
        ({"static": True, "budget": 0.2, "experts": None}, "leaves none of 4 layers"),
        ({"static": True, "budget": 0.5}, "--experts cuts otherwise"),
    ],
)
def test_what_cannot_go_is_refused_before_any_work(
    dense: Path, options: SplitOptions, tmp_path: Path, changed: Any, match: str
) -> None:
    with pytest.raises((InputError, UsageError), match=match):
        split(str(dense), tmp_path / "out", replace(options, **changed))
    assert list(tmp_path.iterdir()) == []


def test_what_does_least_goes_first(dense: Path, options: SplitOptions) -> None:
    """By the joint loss; of FFNs alone others than of layers. The second time nothing is measured."""
    prepared = prepare(open_dense(dense), options)
    ids_BC = calibration_text(prepared).ids_BC[-4:]
    assert choose_absent(prepared, ids_BC, Absent.LAYER, 2, untracked) == ((1, 2), (3, 0))
    assert choose_absent(prepared, ids_BC, Absent.FFN, 3, untracked)[0] == (1, 2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "OutputCheck", None)
        assert choose_absent(prepared, ids_BC, Absent.LAYER, 2, untracked)[0] == (1, 2)


def test_losses_of_absent_parts_are_those_of_stock_transformers(dense: Path, options: SplitOptions) -> None:
    prepared = prepare(open_dense(dense), options)
    ids_BC = calibration_text(prepared).ids_BC[-4:]
    check = OutputCheck(prepared, ids_BC)
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    with torch.no_grad():
        expected = model(ids_BC, use_cache=False).logits.log_softmax(-1)
        for absent, place in ((Absent.LAYER, "model.layers.0"), (Absent.FFN, "model.layers.0.mlp")):

            def silence(_: Any, arguments: Any, output: Any, absent: Absent = absent) -> Any:
                return arguments[0] if absent is Absent.LAYER else torch.zeros_like(output)

            hook = model.get_submodule(place).register_forward_hook(silence)
            found = model(ids_BC, use_cache=False).logits.log_softmax(-1)
            hook.remove()
            divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
            alone = check.without(absent, untracked)[0]
            assert alone.divergence == pytest.approx(divergence, rel=1e-3)
            joint = check.joint(prepared.layout, [absent, None, None, None])
            assert joint.divergence == pytest.approx(divergence, rel=1e-3)


def test_a_search_drops_what_does_nothing(dense: Path, options: SplitOptions, tmp_path: Path) -> None:
    found = search(str(dense), 0.4, options, frontier=False)
    assert {1, 2} & set(found.choice.dropped_layers)
    assert found.choice.share <= 0.4 + 1e-9
    without = search(str(dense), 0.4, options, frontier=False, depth=False)
    assert without.choice.dropped_layers == ()
    assert found.choice.divergence < without.choice.divergence
    result = split(str(dense), tmp_path / "out", replace(options, **found.options))
    assert result.num_active_parameters == found.choice.active_parameters
    assert verify(tmp_path / "out", str(dense)).passed


def test_layers_that_only_seem_to_do_nothing_stay(dense: Path, options: SplitOptions, tmp_path: Path) -> None:
    """Alone each costs nothing, together they cost much: the choice is measured before it is taken."""
    prepared = prepare(open_dense(dense), replace(options, target="qwen2_moe", dense_layers=(1,)))
    cut, none, bad = OutputChange(0.01, 1.0), OutputChange(0.0, 1.0), OutputChange(5.0, 9.0)
    layers = [ScoredLayer(layer, (cut,), none, none, tmp_path) for layer in range(LAYERS)]

    class Check:
        def dense(self) -> OutputChange:
            return none

        def joint(self, _: Layout, changes: Any) -> OutputChange:
            return bad if Absent.LAYER in changes else cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoredLayer, "plan", lambda _self, _i: None)
        points = Points(prepared, [Layout(8, 1, 4)], layers, Check(), droppable=True)  # type: ignore[arg-type]
        assert points.best(0.75, importlib.import_module("moeify.strategies.greedy").choose, "greedy", 1).share == 0.75
        by_depth = points.by_depth(0.75)
    assert by_depth is not None
    assert (len(by_depth.dropped_layers), by_depth.share, by_depth.divergence) == (1, 0.75, 5.0)


def test_controls_by_depth_in_a_comparison(
    dense: Path, options: SplitOptions, calibration_file: Path, tmp_path: Path
) -> None:
    """At whole layers it is the written model; between them one more FFN is pruned, so that no budget is exceeded."""
    text = str(calibration_file)
    names = ["static by depth", "static without FFNs"]
    found = compare(str(dense), [0.5, 0.625], text, options, tokens=1024, only=names)
    rows = {(row.method, row.budget): row for row in found.rows}
    assert next(iter(rows)) == (DENSE, 1.0)
    assert {row.diagnostics.get("dropped_layers") for row in found.rows} == {None, 2, 1}
    assert {row.diagnostics.get("dropped_ffns") for row in found.rows} == {None, 2, 1}
    split(str(dense), tmp_path / "out", SplitOptions(static=True, drop_layers=(1, 2)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids_BC = evaluation_tokens(text, AutoTokenizer.from_pretrained(dense), num_tokens=1024).ids_T.view(-1, CONTEXT)
    with torch.no_grad():
        expected = float(model(input_ids=ids_BC, labels=ids_BC).loss.exp())
    assert rows["static by depth", 0.5].value == pytest.approx(expected, rel=2e-3)
    assert rows["static without FFNs", 0.5].value != rows["static by depth", 0.5].value
    assert rows[REFERENCE, 0.5].ratio == 1
