"""Scores of single layers: against stock transformers, against each other, and after a run that was stopped."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeify.calibration.stream import HiddenStream
from moeify.convert import search_scores as budget
from moeify.convert.layer import converted
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.search_scores import OutputChange, OutputCheck, ScoredLayer, score
from moeify.convert.texts import calibration_text
from moeify.layout import Layout
from moeify.models.dense import open_dense
from moeify.options import SplitOptions

LAYERS = 4
LAYOUTS = (Layout(8, 1, 2), Layout(8, 1, 4), Layout(8, 2, 7))
CHECK = 5


@dataclass(frozen=True)
class Bench:
    model: Path
    prepared: Prepared
    ids_BC: Tensor

    @property
    def checked(self) -> Tensor:
        return self.ids_BC[-CHECK:]

    def check(self) -> OutputCheck:
        return OutputCheck(self.prepared, self.checked)

    def score(self, folder: Path) -> Iterator[ScoredLayer]:
        folder.mkdir(exist_ok=True)
        return score(self.prepared, self.ids_BC, self.check(), LAYOUTS, folder)


@pytest.fixture(scope="module")
def bench(make_dense: MakeDense, calibration_file: Path) -> Bench:
    model = make_dense("llama", num_hidden_layers=LAYERS, intermediate_size=64)
    options = SplitOptions(calibration=(str(calibration_file),), tokens=1024, dense_layers=(1,), dtype="float32")
    prepared = prepare(open_dense(str(model)), options)
    return Bench(model, prepared, calibration_text(prepared).ids_BC)


@pytest.fixture(scope="module")
def scored(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[ScoredLayer]:
    return list(bench.score(tmp_path_factory.mktemp("scores")))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@torch.no_grad()
def by_hand(model: Any, dense: Any, ids_BC: Tensor) -> OutputChange:
    """Divergence and log-perplexity from stock logits, token by token."""
    expected, found = (m(ids_BC).logits.double().log_softmax(dim=-1) for m in (dense, model))
    divergence = (expected.exp() * (expected - found)).sum(dim=-1).mean()
    losses = -found[:, :-1].gather(2, ids_BC[:, 1:, None])
    return OutputChange(float(divergence), float(losses.mean()))


def stock(bench: Bench) -> Any:
    return AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()


class Replaced(torch.nn.Module):
    """A converted FFN inside the stock model."""

    def __init__(self, ffn: Any) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, inputs_BCD: Tensor) -> Tensor:
        outputs: Tensor = self.ffn(inputs_BCD.flatten(0, 1)).view_as(inputs_BCD)
        return outputs


def assert_close(found: OutputChange, expected: OutputChange, tolerance: float = 1e-4) -> None:
    assert found.divergence == pytest.approx(expected.divergence, abs=tolerance, rel=tolerance)
    assert found.log_perplexity == pytest.approx(expected.log_perplexity, abs=tolerance, rel=tolerance)


def test_the_dense_model_diverges_from_itself_by_nothing(bench: Bench) -> None:
    check = bench.check()
    assert check.num_blocks == CHECK
    found, expected = check.dense(), by_hand(stock(bench), stock(bench), bench.checked)
    assert found.divergence == pytest.approx(0, abs=1e-7)
    assert_close(found, expected)
    assert_close(check.joint(LAYOUTS[0], [None] * LAYERS), expected)


def test_a_change_is_what_stock_logits_say(bench: Bench, scored: list[ScoredLayer]) -> None:
    """Of one layer at a time, and of several together."""
    for layer, i in ((0, 0), (1, 2), (LAYERS - 1, 1)):
        model = stock(bench)
        fitted = converted(bench.prepared.ffn(layer), scored[layer].plan(i), bench.prepared.fit(LAYOUTS[i]))
        model.model.layers[layer].mlp = Replaced(fitted)
        expected = by_hand(model, stock(bench), bench.checked)
        assert expected.divergence > 1e-3
        assert_close(scored[layer].changes[i], expected, 1e-3)
    model = stock(bench)
    for layer in (0, 2):
        fitted = converted(bench.prepared.ffn(layer), scored[layer].plan(1), bench.prepared.fit(LAYOUTS[1]))
        model.model.layers[layer].mlp = Replaced(fitted)
    plans = [scored[layer].plan(1) if layer in (0, 2) else None for layer in range(LAYERS)]
    layout = replace(LAYOUTS[1], dense_layers=(1, 3))
    assert_close(bench.check().joint(layout, plans), by_hand(model, stock(bench), bench.checked), 1e-3)


@pytest.mark.parametrize("i", range(len(LAYOUTS)))
def test_a_joint_change_of_one_layer_is_that_of_the_layer(bench: Bench, scored: list[ScoredLayer], i: int) -> None:
    for layer in range(LAYERS):
        plans = [scored[layer].plan(i) if other == layer else None for other in range(LAYERS)]
        layout = replace(LAYOUTS[i], dense_layers=tuple(other for other in range(LAYERS) if other != layer))
        assert_close(bench.check().joint(layout, plans), scored[layer].changes[i])


def test_more_active_experts_change_less(scored: list[ScoredLayer]) -> None:
    for layer in scored:
        divergences = [change.divergence for change in layer.changes]
        assert divergences == sorted(divergences, reverse=True)
        assert divergences[-1] > 0


def test_several_variants_are_finished_as_one_by_one(bench: Bench) -> None:
    check = bench.check()
    stream = HiddenStream(bench.prepared.dense, {"input_ids": bench.checked})
    residual_TD = stream.pass_through(0, bench.prepared.ffn(0)).clone()
    noise_TD = torch.randn(residual_TD.shape, generator=torch.Generator().manual_seed(0))
    variants = [residual_TD, residual_TD + 0.1 * noise_TD, residual_TD - 0.3 * noise_TD]
    together = check.finish(stream.fork(torch.cat(variants)), 1)
    assert len(together) == 3
    for found, variant_TD in zip(together, variants, strict=True):
        assert_close(found, check.finish(stream.fork(variant_TD), 1)[0], 1e-5)
    assert together[0].divergence == pytest.approx(0, abs=1e-6)
    assert 0 < together[1].divergence < together[2].divergence
    # Finishing variants leaves the stream that they were forked from where it was.
    assert torch.equal(stream.residual(), residual_TD)


def test_check_text_does_not_influence_the_fit(bench: Bench, scored: list[ScoredLayer], tmp_path: Path) -> None:
    ids_BC = bench.ids_BC.clone()
    ids_BC[-CHECK:] = ids_BC[-CHECK:].flip(1)
    other = Bench(bench.model, bench.prepared, ids_BC)
    for layer, again in zip(scored, other.score(tmp_path), strict=True):
        assert layer.changes != again.changes
        for i in range(len(LAYOUTS)):
            one, two = layer.plan(i), again.plan(i)
            assert torch.equal(one.labels_F, two.labels_F)
            for part in ("router_RD", "down_DF"):
                assert torch.equal(getattr(one, part), getattr(two, part))


def test_a_stopped_run_goes_on_from_its_finished_layers(
    bench: Bench, scored: list[ScoredLayer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        for layer in bench.score(tmp_path):
            if layer.layer == 1:
                raise KeyboardInterrupt
    names = [f"layer-{layer:05d}.safetensors" for layer in range(LAYERS)]
    assert list(digests(tmp_path)) == names[:2]
    # What a kill in the middle of a write leaves behind.
    (tmp_path / f"{names[2]}.0123.tmp").write_bytes(b"half a file")
    (tmp_path / f"{names[0]}.4567.tmp").write_bytes(b"")
    before = [(tmp_path / name).stat().st_mtime_ns for name in names[:2]]
    fitted: list[int] = []
    really = budget.fit_layer

    def noting(ffn: Any, *arguments: Any, **keywords: Any) -> Any:
        fitted.append(ffn.layer)
        return really(ffn, *arguments, **keywords)

    monkeypatch.setattr(budget, "fit_layer", noting)
    again = list(bench.score(tmp_path))
    assert fitted == [2] * len(LAYOUTS) + [3] * len(LAYOUTS)
    assert [(tmp_path / name).stat().st_mtime_ns for name in names[:2]] == before
    assert [layer.changes for layer in again] == [layer.changes for layer in scored]
    assert {name: digest for name, digest in digests(tmp_path).items() if name in names} == digests(
        scored[0].file.parent
    )


def test_a_failed_fit_leaves_no_file_of_its_layer(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(budget, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        list(bench.score(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_layer_is_scored_again(bench: Bench, scored: list[ScoredLayer], tmp_path: Path) -> None:
    for layer in scored:
        content = layer.file.read_bytes()
        (tmp_path / layer.file.name).write_bytes(content[:-100] if layer.layer == 1 else content)
    assert [layer.changes for layer in bench.score(tmp_path)] == [layer.changes for layer in scored]
    assert digests(tmp_path) == digests(scored[0].file.parent)


def test_plans_are_those_that_were_fitted(bench: Bench, scored: list[ScoredLayer]) -> None:
    for layer in scored:
        for i, layout in enumerate(LAYOUTS):
            plan = layer.plan(i)
            plan.check(layout)
            plan.check_router(layout)
            assert plan.layer == layer.layer
            assert plan.down_DF is not None


def test_without_refit_plans_have_no_columns(bench: Bench, tmp_path: Path) -> None:
    prepared = replace(bench.prepared, options=replace(bench.prepared.options, refit=False))
    for layer in Bench(bench.model, prepared, bench.ids_BC).score(tmp_path):
        assert layer.plan(0).down_DF is None
        assert layer.plan(0).router_RD is not None
