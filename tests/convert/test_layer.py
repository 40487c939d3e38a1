"""One layer: what the fit returns is what the written checkpoint computes, and a replay gives the same bits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import toy_ffn
from torch import Tensor

from moeify import partition, routers
from moeify.calibration import activations as activations_module
from moeify.calibration.activations import Activations
from moeify.convert.layer import ConvertedFFN, LayerFit, active_neurons, converted, fit_layer
from moeify.experts.mixing import UNIT, Mixing, choose_experts
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.plan import SHARED, LayerPlan
from moeify.targets import ROUTER_LIMIT

LAYOUTS = {"shared": Layout(8, 3, 5), "routed": Layout(8, 0, 4), "all on": Layout(8, 2, 8), "static": Layout(8, 5, 5)}
CASES = [(layout, refit, dtype) for layout in LAYOUTS for refit in (True, False) for dtype in ("float32", "bfloat16")]


def fit_of(
    layout: Layout,
    *,
    refit: bool = True,
    dtype: torch.dtype = torch.float32,
    mixing: Mixing = UNIT,
    router: str = "ridge",
) -> LayerFit:
    return LayerFit(layout, partition.find("energy"), routers.find(router), mixing, refit, dtype, seed=0)


def by_hand(ffn: FFNWeights, inputs_TD: Tensor, plan: LayerPlan, layout: Layout, mixing: Mixing = UNIT) -> Tensor:
    """The converted FFN in dense order, token by token, in float64."""
    weight = torch.zeros(len(inputs_TD), ffn.num_neurons, dtype=torch.float64)
    weight[:, plan.labels_F == SHARED] = 1
    if plan.router_RD is not None:
        scores_TR = inputs_TD @ plan.router_RD.float().T
        for token, weight_R in enumerate(mixing.weights(scores_TR, layout)):
            for expert, value in enumerate(weight_R.tolist()):
                weight[token, plan.labels_F == expert] = value
    down_DF = ffn.down_DF if plan.down_DF is None else plan.down_DF
    return (ffn.hidden(inputs_TD) * weight) @ down_DF.double().T


def chosen(inputs_TD: Tensor, plan: LayerPlan, layout: Layout) -> Tensor:
    """keep_TR of a plan's router."""
    assert plan.router_RD is not None
    return choose_experts(inputs_TD @ plan.router_RD.float().T, layout)


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
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout], refit=refit, dtype=getattr(torch, dtype)))
    assert torch.equal(fitted(inputs_TD), outputs_TD)
    again = converted(ffn, fitted.plan, fit_of(LAYOUTS[layout]))
    assert torch.equal(again(inputs_TD), outputs_TD)


@pytest.mark.parametrize(("layout", "refit", "dtype"), CASES)
def test_outputs_are_those_of_the_plan(layout: str, refit: bool, dtype: str) -> None:
    ffn, inputs_TD = toy_ffn()
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout], refit=refit, dtype=getattr(torch, dtype)))
    plan = fitted.plan
    expected = by_hand(ffn, inputs_TD, plan, LAYOUTS[layout])
    torch.testing.assert_close(outputs_TD.double(), expected, rtol=1e-4, atol=1e-4)
    plan.check(LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputed_activations_give_the_same_plan(layout: str, recompute: Callable[[], None]) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=5000)
    kept, kept_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout]))
    recompute()
    assert Activations(ffn, inputs_TD)._kept is None
    again, again_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS[layout]))
    assert torch.equal(kept_TD, again_TD)
    assert torch.equal(kept.plan.labels_F, again.plan.labels_F)
    assert kept.plan.diagnostics == again.plan.diagnostics


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
    ffn, inputs_TD = toy_ffn(num_tokens=5000)
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"], dtype=torch.bfloat16))
    plan = fitted.plan
    assert plan.router_RD is not None
    assert plan.down_DF is not None
    assert plan.router_RD.dtype == plan.down_DF.dtype == torch.bfloat16
    assert outputs_TD.dtype == torch.float32
    # Routing with the rounded router, not with the one that was fitted.
    rounded = chosen(inputs_TD, plan, LAYOUTS["shared"])
    exact = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"]))[0].plan
    assert exact.router_RD is not None
    assert not torch.equal(rounded, chosen(inputs_TD, exact, LAYOUTS["shared"]))
    torch.testing.assert_close(plan.router_RD.float(), exact.router_RD, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_scores_reach_the_limit_and_no_further(dtype: torch.dtype) -> None:
    ffn, inputs_TD = toy_ffn()
    fitted, _ = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"], dtype=dtype))
    plan = fitted.plan
    assert plan.router_RD is not None
    scores_TR = inputs_TD @ plan.router_RD.float().T
    assert float(scores_TR.abs().max()) == pytest.approx(ROUTER_LIMIT, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    torch.testing.assert_close(scores_TR.mean(dim=1), torch.zeros(600), atol=0.05, rtol=0)


def test_a_saved_plan_is_used_as_it_is_and_refit_again() -> None:
    ffn, inputs_TD = toy_ffn()
    first = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"]))[0].plan
    other = toy_ffn(seed=9)[1]
    fit = replace(fit_of(LAYOUTS["shared"]), seed=5)
    again = fit_layer(ffn, other, fit, replace(first, down_DF=None))[0].plan
    assert torch.equal(again.labels_F, first.labels_F)
    assert again.router_RD is not None
    assert first.router_RD is not None
    assert torch.equal(again.router_RD, first.router_RD)
    assert again.down_DF is not None
    assert first.down_DF is not None
    assert not torch.equal(again.down_DF, first.down_DF)


def test_refit_keeps_the_columns_that_are_never_active() -> None:
    ffn, inputs_TD = toy_ffn()
    fitted, _ = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["static"]))
    plan = fitted.plan
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
    scores_TR = inputs_TD @ router_RD.T
    keep_TR = choose_experts(scores_TR, Layout(8, 3, 5))
    assert keep_TR.dtype == torch.bool
    assert keep_TR.sum(dim=1).unique().tolist() == [2]
    lowest_kept = scores_TR.masked_fill(~keep_TR, torch.inf).min(dim=1).values
    assert bool((lowest_kept >= scores_TR.masked_fill(keep_TR, -torch.inf).max(dim=1).values).all())
    # A router that scores all alike still chooses two.
    assert choose_experts(torch.zeros(600, 5), Layout(8, 3, 5)).sum(dim=1).unique().tolist() == [2]


def test_diagnostics_are_what_they_say() -> None:
    ffn, inputs_TD = toy_ffn()
    layout = LAYOUTS["shared"]
    fitted, _ = fit_layer(ffn, inputs_TD, fit_of(layout))
    plan = fitted.plan
    assert plan.router_RD is not None
    keep_TR = chosen(inputs_TD, plan, layout)
    load_R = keep_TR.float().mean(dim=0)
    assert plan.diagnostics["smallest_expert_load"] == pytest.approx(float(load_R.min()))
    assert plan.diagnostics["largest_expert_load"] == pytest.approx(float(load_R.max()))
    hidden_TF = ffn.hidden(inputs_TD)
    # The columns of an expert are taken as orthogonal.
    contribution_TF = hidden_TF * ffn.down_DF.norm(dim=0)
    norms_TR = torch.stack([contribution_TF[:, plan.neurons(r)].norm(dim=1) for r in range(5)], dim=1)
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
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(layout, refit=False))
    plan = fitted.plan
    dense_TD = ffn.hidden(inputs_TD) @ ffn.down_DF.T
    assert plan.router_RD is not None
    worse = converted(ffn, replace(plan, router_RD=-plan.router_RD), fit_of(layout))(inputs_TD)
    assert (outputs_TD - dense_TD).square().sum() < 0.7 * (worse - dense_TD).square().sum()


@pytest.mark.parametrize("case", ["one routed expert", "silent gate", "silent down"])
def test_a_router_with_nothing_to_rank_is_finite(case: str) -> None:
    ffn, inputs_TD = toy_ffn()
    if case != "one routed expert":
        (ffn.gate_FD if case == "silent gate" else ffn.down_DF).zero_()
    layout = Layout(3, 2, 3) if case == "one routed expert" else LAYOUTS["shared"]
    fitted, _ = fit_layer(ffn, inputs_TD, fit_of(layout, refit=False))
    plan = fitted.plan
    assert plan.router_RD is not None
    assert plan.router_RD.isfinite().all()


def test_diagnostics_of_a_silent_ffn_are_finite() -> None:
    ffn, inputs_TD = toy_ffn()
    ffn.gate_FD.zero_()
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"], refit=False))
    plan = fitted.plan
    assert not outputs_TD.any()
    assert torch.tensor(list(plan.diagnostics.values())).isfinite().all()


MIXINGS = {
    "softmax": (Layout(8, 3, 5), Mixing("softmax")),
    "softmax, cold, mean": (Layout(8, 0, 4), Mixing("softmax", 0.5, "mean")),
    "soft": (Layout(8, 2, 8), Mixing("soft")),
    "soft, mean": (Layout(8, 0, 8), Mixing("soft", 2.0, "mean")),
    "hard, mean": (Layout(8, 3, 5), Mixing("hard", 1.0, "mean")),
}


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("refit", [True, False])
def test_other_mixings_weight_the_experts_and_replay_the_same_bits(mixing: str, refit: bool) -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=5000)
    layout, weighting = MIXINGS[mixing]
    fit = fit_of(layout, refit=refit, mixing=weighting)
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit)
    assert torch.equal(converted(ffn, fitted.plan, fit)(inputs_TD), outputs_TD)
    expected = by_hand(ffn, inputs_TD, fitted.plan, layout, weighting)
    torch.testing.assert_close(outputs_TD.double(), expected, rtol=1e-4, atol=1e-4)
    # The mixing matters: with weights of one the same plan gives something else.
    assert not torch.allclose(outputs_TD, converted(ffn, fitted.plan, fit_of(layout))(inputs_TD), atol=0.1)


def test_a_dense_layer_is_left_whole() -> None:
    ffn, inputs_TD = toy_ffn()
    fit = fit_of(replace(LAYOUTS["shared"], dense_layers=(0, 3)))
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit)
    assert bool((fitted.plan.labels_F == SHARED).all())
    assert fitted.plan.router_RD is fitted.plan.down_DF is None
    assert not fitted.plan.diagnostics
    fitted.plan.check(fit.layout)
    fitted.plan.check_router(fit.layout)
    torch.testing.assert_close(outputs_TD, ffn(inputs_TD))
    assert torch.equal(converted(ffn, fitted.plan, fit)(inputs_TD), outputs_TD)
    cut, _ = fit_layer(replace(ffn, layer=1), inputs_TD, fit)
    assert cut.plan.router_RD is not None


def test_a_refit_may_aim_for_something_else() -> None:
    ffn, inputs_TD = toy_ffn(num_tokens=3000)
    goal_TD = ffn(inputs_TD) + 0.5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(4))[0]
    fit = fit_of(LAYOUTS["shared"])
    own = fit_layer(ffn, inputs_TD, fit)
    moved = fit_layer(ffn, inputs_TD, fit, goal_TD=goal_TD)
    assert torch.equal(own[0].plan.labels_F, moved[0].plan.labels_F)
    assert (moved[1] - goal_TD).square().mean() < (own[1] - goal_TD).square().mean()


def test_a_router_that_is_not_linear_scores_but_is_in_no_plan() -> None:
    ffn, inputs_TD = toy_ffn()
    fitted, outputs_TD = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["shared"], router="representative"))
    assert isinstance(fitted, ConvertedFFN)
    assert fitted.plan.router_RD is None
    assert fitted.router is not None
    assert torch.equal(fitted(inputs_TD), outputs_TD)


def planted_energy() -> tuple[FFNWeights, Tensor]:
    """Eight slices of three neurons, six of which fire only for their own sixth of the tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs_TD = 0.01 * torch.randn(1200, 8, generator=generator)
    group_T = torch.arange(1200) % 6
    inputs_TD[torch.arange(1200), group_T] += 1
    gate_FD, up_FD = torch.zeros(24, 8), torch.zeros(24, 8)
    for neuron in range(24):
        gate_FD[neuron, neuron // 3 % 6] = up_FD[neuron, neuron // 3 % 6] = 4
    # The last two groups of neurons are always on, by an input that is always there.
    inputs_TD[:, 7] = 1
    gate_FD[18:], up_FD[18:] = 0, 0
    gate_FD[18:, 7] = up_FD[18:, 7] = 6
    down_DF = torch.randn(8, 24, generator=generator)
    return FFNWeights(0, gate_FD, up_FD, down_DF / down_DF.norm(dim=0), "silu"), inputs_TD


def test_kept_energy_lies_between_static_and_oracle_where_routing_pays() -> None:
    ffn, inputs_TD = planted_energy()
    found = fit_layer(ffn, inputs_TD, fit_of(Layout(8, 2, 3)))[0].plan.diagnostics
    assert found["energy_kept_static"] < found["energy_kept"] <= found["energy_kept_oracle"] + 1e-6 <= 1 + 2e-6
    # A linear router sees which sixth a token is of, and then one routed expert is all there is to keep.
    assert found["energy_kept"] == pytest.approx(1, abs=0.01)
    assert found["oracle_gain_reached"] == pytest.approx(1, abs=0.02)
    assert found["router_energy_of_oracle"] == pytest.approx(1, abs=0.01)
    assert found["load_entropy"] == pytest.approx(1, abs=1e-4)
    assert found["smallest_expert_load"] == pytest.approx(1 / 6)
    assert found["largest_expert_load"] == pytest.approx(1 / 6)


def test_energies_follow_their_definitions() -> None:
    ffn, inputs_TD = toy_ffn()
    layout = LAYOUTS["shared"]
    plan = fit_layer(ffn, inputs_TD, fit_of(layout))[0].plan
    hidden_TF = ffn.hidden(inputs_TD).double()
    norm_T = (hidden_TF @ ffn.down_DF.double().T).norm(dim=1)
    weight_T = (5 * norm_T.median() / norm_T).clamp(max=1)
    energy_TF = (hidden_TF * ffn.down_DF.double().norm(dim=0) * weight_T[:, None]).square()
    energy_TR = torch.stack([energy_TF[:, plan.neurons(r)].sum(1) for r in range(5)], dim=1)
    shared, total = energy_TF[:, plan.neurons(SHARED)].sum(), energy_TF.sum()
    found = plan.diagnostics
    assert found["energy_kept"] == pytest.approx(
        float((shared + (energy_TR * chosen(inputs_TD, plan, layout)).sum()) / total), rel=1e-4
    )
    assert found["energy_kept_oracle"] == pytest.approx(
        float((shared + energy_TR.topk(2, dim=1).values.sum()) / total), rel=1e-4
    )
    assert found["energy_kept_static"] == pytest.approx(
        float(energy_TF.sum(0).sort(descending=True).values[: 5 * 3].sum() / total), rel=1e-4
    )
    gain = found["energy_kept_oracle"] - found["energy_kept_static"]
    assert gain > 0
    assert found["oracle_gain_reached"] == pytest.approx((found["energy_kept"] - found["energy_kept_static"]) / gain)
    load_R = chosen(inputs_TD, plan, layout).double().mean(0) / 2
    assert found["load_entropy"] == pytest.approx(
        float(-(load_R * load_R.log()).sum() / torch.tensor(5.0).log()), rel=1e-4
    )


def test_load_entropy_is_zero_if_one_expert_gets_every_token() -> None:
    ffn, inputs_TD = toy_ffn()
    inputs_TD[:, 0] = 10
    layout = Layout(4, 0, 1)
    plan = fit_layer(ffn, inputs_TD, fit_of(layout))[0].plan
    rows_RD = torch.zeros(4, 8)
    rows_RD[2, 0] = 1
    found = fit_layer(ffn, inputs_TD, fit_of(layout), replace(plan, router_RD=rows_RD))[0].plan.diagnostics
    assert found["load_entropy"] == 0
    assert (found["smallest_expert_load"], found["largest_expert_load"]) == (0, 1)


def test_a_static_plan_says_what_it_keeps_and_nothing_of_routing() -> None:
    ffn, inputs_TD = toy_ffn()
    found = fit_layer(ffn, inputs_TD, fit_of(LAYOUTS["static"], refit=False))[0].plan.diagnostics
    assert set(found) == {"massive_neurons", "energy_kept_static"}
    assert 0.5 < found["energy_kept_static"] < 1
