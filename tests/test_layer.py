"""One layer: what the fit returns is what the written checkpoint computes, and a replay gives the same bits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import toy_ffn
from torch import Tensor

from moeify import activations as activations_module
from moeify import partition, routers
from moeify.activations import Activations
from moeify.ffn import FFNWeights
from moeify.layer import LayerFit, active_neurons, choose_experts, fit_layer, replay_layer
from moeify.plan import SHARED, LayerPlan, Layout
from moeify.targets import ROUTER_LIMIT

LAYOUTS = {"shared": Layout(8, 3, 5), "routed": Layout(8, 0, 4), "all on": Layout(8, 2, 8), "static": Layout(8, 5, 5)}
CASES = [(layout, refit, dtype) for layout in LAYOUTS for refit in (True, False) for dtype in ("float32", "bfloat16")]


def fit_of(layout: Layout, *, refit: bool = True, dtype: torch.dtype = torch.float32) -> LayerFit:
    return LayerFit(layout, partition.find("energy"), routers.find("ridge"), refit, dtype, seed=0)


def by_hand(ffn: FFNWeights, inputs_TD: Tensor, plan: LayerPlan, layout: Layout) -> Tensor:
    """The converted FFN in dense order, token by token, in float64."""
    keep = torch.zeros(len(inputs_TD), ffn.num_neurons, dtype=torch.bool)
    keep[:, plan.labels_F == SHARED] = True
    if plan.router_RD is not None:
        scores_TR = inputs_TD @ plan.router_RD.float().T
        for token, chosen in enumerate(scores_TR.topk(layout.num_routed_active, dim=1).indices):
            for expert in chosen.tolist():
                keep[token, plan.labels_F == expert] = True
    down_DF = ffn.down_DF if plan.down_DF is None else plan.down_DF
    return (ffn.hidden(inputs_TD) * keep).double() @ down_DF.double().T


@pytest.fixture
def recompute(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Nothing is kept: activations are computed again in every pass, as for a large model."""

    def switch() -> None:
        monkeypatch.setattr(Activations.__init__, "__defaults__", (0,))
        monkeypatch.setattr(activations_module, "CHUNK_TOKENS", 4096)

    return switch


@pytest.mark.parametrize(("layout", "refit", "dtype"), CASES)
def test_a_replay_gives_the_same_bits(layout: str, refit: bool, dtype: str) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=5000)
    plan, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout], refit=refit, dtype=getattr(torch, dtype)))
    assert torch.equal(replay_layer(ffn, inputs_TD, plan, LAYOUTS[layout]), outputs_TD)


@pytest.mark.parametrize(("layout", "refit", "dtype"), CASES)
def test_outputs_are_those_of_the_plan(layout: str, refit: bool, dtype: str) -> None:
    ffn, inputs_TD = toy_ffn()
    plan, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout], refit=refit, dtype=getattr(torch, dtype)))
    expected = by_hand(ffn, inputs_TD, plan, LAYOUTS[layout])
    torch.testing.assert_close(outputs_TD.double(), expected, rtol=1e-4, atol=1e-4)
    plan.check(LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_activations_give_the_same_plan(layout: str, recompute: Callable[[], None]) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=5000)
    kept = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout]))
    recompute()
    assert Activations(ffn, inputs_TD)._kept is None
    again = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout]))
    assert torch.equal(kept[1], again[1])
    assert torch.equal(kept[0].labels_F, again[0].labels_F)
    assert kept[0].diagnostics == again[0].diagnostics


def test_the_dense_weights_are_left_alone() -> None:
    """In float32 nothing is rounded, so a conversion that does not copy would refit the dense model itself."""
    ffn, inputs_TD = toy_ffn()
    before = [t.clone() for t in (ffn.gate_FD, ffn.up_FD, ffn.down_DF, inputs_TD)]
    for layout in LAYOUTS.values():
        fit_layer(ffn, inputs_TD, fit_of(layout))
    after = (ffn.gate_FD, ffn.up_FD, ffn.down_DF, inputs_TD)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_all_experts_on_is_the_dense_ffn() -> None:
    ffn, inputs_TD = toy_ffn()
    _, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(Layout(8, 2, 8), refit=False))
    torch.testing.assert_close(outputs_TD, ffn.hidden(inputs_TD) @ ffn.down_DF.T, rtol=1e-4, atol=1e-5)


def test_everything_in_a_plan_has_the_checkpoints_dtype() -> None:
    ffn, inputs_TD = toy_ffn()
    plan, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"], dtype=torch.bfloat16))
    assert plan.router_RD is not None
    assert plan.down_DF is not None
    assert plan.router_RD.dtype == plan.down_DF.dtype == torch.bfloat16
    assert outputs_TD.dtype == torch.float32
    # Routing with the rounded router, not with the one that was fitted.
    rounded = choose_experts(inputs_TD, plan.router_RD, LAYOUTS["shared"])
    exact, _ = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"]))
    assert exact.router_RD is not None
    assert not torch.equal(rounded, choose_experts(inputs_TD, exact.router_RD, LAYOUTS["shared"]))
    torch.testing.assert_close(plan.router_RD.float(), exact.router_RD, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_scores_reach_the_limit_and_no_further(dtype: torch.dtype) -> None:
    ffn, inputs_TD = toy_ffn()
    plan, _ = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"], dtype=dtype))
    assert plan.router_RD is not None
    scores_TR = inputs_TD @ plan.router_RD.float().T
    assert float(scores_TR.abs().max()) == pytest.approx(ROUTER_LIMIT, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(scores_TR.mean(dim=1), torch.zeros(600), atol=0.05, rtol=0)


def test_a_saved_plan_is_used_as_it_is_and_refit_again() -> None:
    ffn, inputs_TD = toy_ffn()
    first, _ = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"]))
    other = toy_ffn(seed=9)[1]
    again, _ = fit_layer(ffn, other, replace(fit_of(LAYOUTS["shared"]), seed=5), replace(first, down_DF=None))
    assert torch.equal(again.labels_F, first.labels_F)
    assert again.router_RD is not None
    assert first.router_RD is not None
    assert torch.equal(again.router_RD, first.router_RD)
    assert again.down_DF is not None
    assert first.down_DF is not None
    assert not torch.equal(again.down_DF, first.down_DF)


def test_refit_keeps_the_columns_that_are_never_active() -> None:
    ffn, inputs_TD = toy_ffn()
    plan, _ = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["static"]))
    assert plan.router_RD is None
    assert plan.down_DF is not None
    dropped = plan.labels_F != SHARED
    assert int(dropped.sum()) == 9
    assert torch.equal(plan.down_DF[:, dropped], ffn.down_DF[:, dropped])
    assert not torch.equal(plan.down_DF[:, ~dropped], ffn.down_DF[:, ~dropped])


def test_active_neurons_stand_shared_first_then_expert_by_expert() -> None:
    labels_F = torch.tensor([1, -1, 0, 0, -1, 1, 2, 2], dtype=torch.int16)
    plan = LayerPlan(0, labels_F, None)
    assert active_neurons(plan, Layout(4, 1, 2)).tolist() == [1, 4, 2, 3, 0, 5, 6, 7]
    assert active_neurons(plan, Layout(4, 1, 1)).tolist() == [1, 4]


def test_every_token_gets_exactly_its_experts() -> None:
    _, inputs_TD = toy_ffn()
    router_RD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    keep_TR = choose_experts(inputs_TD, router_RD, Layout(8, 3, 5))
    assert keep_TR.dtype == torch.bool
    assert keep_TR.sum(dim=1).unique().tolist() == [2]
    scores_TR = inputs_TD @ router_RD.T
    lowest_kept = scores_TR.masked_fill(~keep_TR, torch.inf).min(dim=1).values
    assert bool((lowest_kept >= scores_TR.masked_fill(keep_TR, -torch.inf).max(dim=1).values).all())
    # A router that scores all alike still chooses two.
    assert choose_experts(inputs_TD, torch.zeros(5, 8), Layout(8, 3, 5)).sum(dim=1).unique().tolist() == [2]


def test_diagnostics_are_what_they_say() -> None:
    ffn, inputs_TD = toy_ffn()
    layout = LAYOUTS["shared"]
    plan, _ = fit_layer(ffn, inputs_TD, fit_of(layout))
    assert plan.router_RD is not None
    keep_TR = choose_experts(inputs_TD, plan.router_RD, layout)
    load_R = keep_TR.float().mean(dim=0)
    assert plan.diagnostics["smallest_expert_load"] == pytest.approx(float(load_R.min()))
    assert plan.diagnostics["largest_expert_load"] == pytest.approx(float(load_R.max()))
    hidden_TF = ffn.hidden(inputs_TD)
    norms_TR = torch.stack(
        [(hidden_TF[:, plan.neurons(r)] @ ffn.down_DF[:, plan.neurons(r)].T).norm(dim=1) for r in range(5)], dim=1
    )
    norm_T = (hidden_TF @ ffn.down_DF.T).norm(dim=1)
    energy_TR = (norms_TR * (5 * norm_T.median() / norm_T).clamp(max=1)[:, None]).square()
    oracle_TR = torch.zeros_like(keep_TR).scatter_(1, norms_TR.topk(2).indices, value=True)
    expected = float((energy_TR * keep_TR).sum() / (energy_TR * oracle_TR).sum())
    assert plan.diagnostics["router_energy_of_oracle"] == pytest.approx(expected, rel=1e-3)
    assert expected < 1
    assert plan.diagnostics["massive_neurons"] == 0
    assert plan.diagnostics["error_with_refit"] < plan.diagnostics["error_without_refit"]


def test_a_router_is_better_than_none() -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=2000)
    layout = LAYOUTS["routed"]
    plan, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(layout, refit=False))
    dense_TD = ffn.hidden(inputs_TD) @ ffn.down_DF.T
    assert plan.router_RD is not None
    worse = replay_layer(ffn, inputs_TD, replace(plan, router_RD=-plan.router_RD), layout)
    assert (outputs_TD - dense_TD).square().sum() < 0.7 * (worse - dense_TD).square().sum()


@pytest.mark.parametrize("case", ["one routed expert", "silent gate", "silent down"])
def test_a_router_with_nothing_to_rank_is_finite(case: str) -> None:
    ffn, inputs_TD = toy_ffn()
    if case != "one routed expert":
        (ffn.gate_FD if case == "silent gate" else ffn.down_DF).zero_()
    layout = Layout(3, 2, 3) if case == "one routed expert" else LAYOUTS["shared"]
    plan, _ = fit_layer(ffn, inputs_TD, fit_of(layout, refit=False))
    assert plan.router_RD is not None
    assert plan.router_RD.isfinite().all()


def test_diagnostics_of_a_silent_ffn_are_finite() -> None:
    ffn, inputs_TD = toy_ffn()
    ffn.gate_FD.zero_()
    plan, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"], refit=False))
    assert not outputs_TD.any()
    assert torch.tensor(list(plan.diagnostics.values())).isfinite().all()
