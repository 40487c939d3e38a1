"""Every router: shape, dtype, reproducibility; and that it ranks experts by what it says it does."""

from dataclasses import replace

import pytest
import torch
from conftest import toy_ffn
from torch import Tensor

from moeify import routers
from moeify.calibration import regression
from moeify.calibration.activations import Activations, measure
from moeify.layout import Layout
from moeify.routers import LinearRouter, RoutingTask, membership, representative, ridge

HIDDEN, ROUTED = 16, 6
# These learn from norms; the others look at weights.
BY_NORMS = ("membership", "mlp", "ridge")


def toy_task(dtype: torch.dtype = torch.float32, num_tokens: int = 800) -> RoutingTask:
    """norms_TR = what all experts have in common + a linear function of the input."""
    ffn, inputs_TD = toy_ffn(num_neurons=24, hidden=HIDDEN, num_tokens=num_tokens)
    weights = {name: getattr(ffn, name).to(dtype) for name in ("gate_FD", "up_FD", "down_DF")}
    ffn, inputs_TD = replace(ffn, **weights), inputs_TD.to(dtype)
    stats = measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0)
    generator = torch.Generator().manual_seed(1)
    common_T1 = 30 + 5 * torch.rand(num_tokens, 1, generator=generator).to(dtype)
    norms_TR = common_T1 + inputs_TD @ planted_rows().to(dtype).T
    labels_F = (torch.arange(24) // 3 - 2).clamp(min=-1).to(torch.int16)
    labels_F = labels_F[torch.randperm(24, generator=generator)]
    return RoutingTask(ffn, labels_F, Layout(8, 2, 4), stats, inputs_TD, norms_TR, seed=0)


def planted_rows() -> Tensor:
    rows_RD = torch.randn(ROUTED, HIDDEN, generator=torch.Generator().manual_seed(2))
    return rows_RD - rows_RD.mean(0)


def halves(task: RoutingTask) -> tuple[RoutingTask, RoutingTask]:
    """One to fit on, one to look at."""
    half = len(task.inputs_TD) // 2
    return (
        replace(task, inputs_TD=task.inputs_TD[:half], norms_TR=task.norms_TR[:half]),
        replace(task, inputs_TD=task.inputs_TD[half:], norms_TR=task.norms_TR[half:]),
    )


def agreement(scores_TR: Tensor, norms_TR: Tensor, count: int = 2) -> float:
    """Share of the best experts that are also the highest scored."""
    best = [set(row.tolist()) for row in norms_TR.topk(count, dim=1).indices]
    found = [set(row.tolist()) for row in scores_TR.topk(count, dim=1).indices]
    return sum(len(a & b) for a, b in zip(best, found, strict=True)) / (count * len(best))


def kept(scores_TR: Tensor, norms_TR: Tensor, count: int = 2) -> float:
    """Share of the best experts' energy that the highest scored ones have."""
    energy_TR = norms_TR.square()
    chosen = energy_TR.gather(1, scores_TR.topk(count, dim=1).indices).sum()
    return float(chosen / energy_TR.topk(count, dim=1).values.sum())


@pytest.mark.parametrize("name", routers.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_repeatability(name: str, dtype: torch.dtype) -> None:
    task = toy_task(dtype)
    tensors = [t for record in (task, task.ffn, task.stats) for t in vars(record).values() if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    torch.manual_seed(1)
    first_TR = routers.find(name)(task)(task.inputs_TD)
    torch.manual_seed(2)
    assert torch.equal(first_TR, routers.find(name)(task)(task.inputs_TD))
    assert (first_TR.shape, first_TR.dtype) == ((800, ROUTED), dtype)
    assert first_TR.isfinite().all()
    assert not first_TR.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("name", routers.names())
def test_linear_routers_say_so(name: str) -> None:
    task = toy_task()
    router, width = routers.find(name)(task), routers.width(name)
    assert isinstance(router, LinearRouter) == routers.is_written(name)
    if isinstance(router, LinearRouter):
        assert (router.rows_RD.shape, router.rows_RD.dtype) == ((ROUTED, width or HIDDEN), torch.float32)
        assert routers.is_linear(name) == (router.units_HC is None)
        assert router.units_HC is None or router.units_HC.shape == (width, HIDDEN + 1)


@pytest.mark.parametrize("name", BY_NORMS)
def test_a_planted_linear_ranking_is_recovered_on_other_tokens(name: str) -> None:
    seen, unseen = halves(toy_task())
    router = routers.find(name)(seen)
    assert agreement(router(unseen.inputs_TD), unseen.norms_TR) > (0.98 if name == "ridge" else 0.88)
    # Chance is a third: the test can fail.
    assert agreement(unseen.inputs_TD @ planted_rows().flip(0).T, unseen.norms_TR) < 0.6


@pytest.mark.parametrize("name", BY_NORMS)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_norms_and_of_inputs_does_not_matter(name: str, scale: float) -> None:
    seen, unseen = halves(toy_task())
    scaled = replace(seen, inputs_TD=seen.inputs_TD * scale, norms_TR=seen.norms_TR / scale)
    plain_TR = routers.find(name)(seen)(unseen.inputs_TD)
    assert agreement(routers.find(name)(scaled)(unseen.inputs_TD * scale), plain_TR) > 0.98


@pytest.mark.parametrize("name", routers.names())
@pytest.mark.parametrize("layout", [Layout(8, 7, 8), Layout(8, 2, 8), Layout(8, 6, 7)], ids=str)
def test_little_or_nothing_to_choose_is_possible(name: str, layout: Layout) -> None:
    task = toy_task()
    labels_F = (torch.arange(24) // 3 - layout.num_shared).clamp(min=-1).to(torch.int16)
    norms_TR = task.norms_TR[:, : layout.num_routed]
    scores_TR = routers.find(name)(replace(task, labels_F=labels_F, norms_TR=norms_TR, layout=layout))(task.inputs_TD)
    assert scores_TR.shape == (800, layout.num_routed)
    assert scores_TR.isfinite().all()


@pytest.mark.parametrize("name", routers.names())
@pytest.mark.parametrize("degenerate", ["silent", "one neuron", "constant features", "few tokens"])
def test_scores_stay_finite(name: str, degenerate: str) -> None:
    task = toy_task()
    ffn, inputs_TD, norms_TR = task.ffn, task.inputs_TD.clone(), task.norms_TR
    if degenerate in {"silent", "one neuron"}:
        value = float(degenerate != "silent")
        weights = {part: torch.full_like(getattr(ffn, part), value) for part in ("gate_FD", "up_FD", "down_DF")}
        ffn, norms_TR = replace(ffn, **weights), torch.full_like(norms_TR, value)
    elif degenerate == "constant features":
        inputs_TD[:, 3] = 0
        inputs_TD[:, 4] = inputs_TD[:, 5]
    else:
        inputs_TD, norms_TR = inputs_TD[:5], norms_TR[:5]
    stats = measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0)
    router = routers.find(name)(replace(task, ffn=ffn, stats=stats, inputs_TD=inputs_TD, norms_TR=norms_TR))
    assert router(task.inputs_TD).isfinite().all()


def test_ridge_is_the_closed_form() -> None:
    task = toy_task()
    x, y = task.inputs_TD.double(), task.norms_TR.double()
    y = y - y.mean(dim=1, keepdim=True)
    gram = x.T @ x
    damped = gram + regression.PENALTY * gram.trace() / HIDDEN * torch.eye(HIDDEN, dtype=torch.float64)
    expected = torch.linalg.solve(damped, x.T @ y).T
    torch.testing.assert_close(ridge.fit(task).rows_RD.double(), expected, rtol=1e-4, atol=1e-4)


def test_ridge_does_not_see_what_all_experts_have_in_common() -> None:
    task = toy_task()
    moved = replace(task, norms_TR=task.norms_TR + 100 * task.inputs_TD[:, :1])
    torch.testing.assert_close(ridge.fit(task).rows_RD, ridge.fit(moved).rows_RD, rtol=1e-3, atol=1e-3)


def stakes_task() -> RoutingTask:
    """Norms that no linear function gives, and that are far larger in some tokens than in others."""
    task = toy_task(num_tokens=4000)
    size_T1 = torch.randn(4000, 1, generator=torch.Generator().manual_seed(3)).exp()
    return replace(task, norms_TR=size_T1 * (task.inputs_TD @ planted_rows().T / 2).exp())


def test_membership_keeps_more_than_its_start_and_than_a_router_that_never_saw_norms() -> None:
    seen, unseen = halves(stakes_task())
    lost = {
        name: 1 - kept(routers.find(name)(seen)(unseen.inputs_TD), unseen.norms_TR)
        for name in ("centroid", "membership", "ridge")
    }
    assert lost["membership"] < 0.2 * lost["ridge"]
    assert lost["membership"] < 0.01 * lost["centroid"]


def test_membership_weighs_confusions_by_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one token of ten it matters whether expert 0 or 1 is chosen, and there the direction is the opposite."""
    # Far enough from its start, which knows the costs too.
    monkeypatch.setattr(membership, "RATE", 1.0)
    task = toy_task(num_tokens=2000)
    sign_T = task.inputs_TD[:, 0].sign()
    matters_T = torch.arange(2000) % 10 == 0
    first_T = torch.where(matters_T, 10 * sign_T, -0.01 * sign_T)
    norms_TR = torch.stack([20 + first_T, 20 - first_T], dim=1)
    labels_F = (torch.arange(24) // 12).to(torch.int16)
    task = replace(task, labels_F=labels_F, norms_TR=norms_TR, layout=Layout(2, 0, 1))
    scores_TR = routers.find("membership")(task)(task.inputs_TD)
    right_T = (scores_TR[:, 0] > scores_TR[:, 1]) == (norms_TR[:, 0] > norms_TR[:, 1])
    assert float(right_T[matters_T].float().mean()) > 0.9
    assert float(right_T[~matters_T].float().mean()) < 0.2


def test_mlp_ranks_what_no_linear_router_can() -> None:
    """Norms that are the same for an input and its opposite."""
    task = toy_task(num_tokens=4000)
    seen, unseen = halves(replace(task, norms_TR=(task.inputs_TD @ planted_rows().T).abs()))
    found = {name: agreement(routers.find(name)(seen)(unseen.inputs_TD), unseen.norms_TR) for name in ("mlp", "ridge")}
    assert found["ridge"] < 0.45
    assert found["mlp"] > 0.7


def test_centroid_is_the_mean_gate_row() -> None:
    task = toy_task()
    router = routers.find("centroid")(task)
    assert isinstance(router, LinearRouter)
    for expert in range(ROUTED):
        members = [row for row, label in zip(task.ffn.gate_FD, task.labels_F.tolist(), strict=True) if label == expert]
        torch.testing.assert_close(router.rows_RD[expert], sum(members, torch.zeros(HIDDEN)) / 3)


def test_representatives_are_members_of_their_experts_with_the_most_typical_markers() -> None:
    task = toy_task()
    chosen_R = representative.representatives(task)
    assert task.labels_F[chosen_R].tolist() == list(range(ROUTED))
    # Two neurons of an expert that do the same agree with its mean marker better than the third.
    for expert in range(ROUTED):
        first, second, _ = (task.labels_F == expert).nonzero().flatten().tolist()
        for rows_FD in (task.ffn.gate_FD, task.ffn.up_FD):
            rows_FD[second] = 3 * rows_FD[first]
        assert int(representative.representatives(task)[expert]) in {first, second}


def test_representative_scores_are_what_the_neuron_does() -> None:
    task = toy_task()
    neuron = int(representative.representatives(task)[4])
    gate_D, up_D = (rows[neuron] / rows[neuron].norm() for rows in (task.ffn.gate_FD, task.ffn.up_FD))
    expected_T = (torch.nn.functional.silu(task.inputs_TD @ gate_D) * (task.inputs_TD @ up_D)).abs()
    torch.testing.assert_close(representative.fit(task)(task.inputs_TD)[:, 4], expected_T)
