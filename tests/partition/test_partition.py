"""Every partition: exact sizes, one label a neuron, the same for the same seed; and what single methods promise."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import toy_ffn
from torch import Tensor

from moeify import partition
from moeify.calibration.activations import Activations, ActivationStats, measure
from moeify.calibration.regression import cholesky, rank
from moeify.experts.mixing import choose_experts
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.partition import gradient, routed
from moeify.partition._balanced import balanced_kmeans
from moeify.plan import SHARED, LayerPlan

# These look at what a neuron does, not at where it is stored.
BY_CONTENT = ("energy", "gradient", "kmeans", "marker", "routed")
# Of these, the ones that take shared neurons by energy.
BY_ENERGY = ("energy", "kmeans")
LAYOUTS = [(8, 4, 6), (8, 0, 6), (4, 3, 4), (2, 0, 1), (24, 8, 12), (8, 6, 6), (6, 1, 3)]


def toy(seed: int = 0) -> tuple[FFNWeights, ActivationStats]:
    ffn, inputs_TD = toy_ffn(seed=seed)
    return ffn, measured(ffn, inputs_TD)


def measured(ffn: FFNWeights, inputs_TD: Tensor) -> ActivationStats:
    gradient_GD = torch.randn(inputs_TD.shape, generator=torch.Generator().manual_seed(9))
    return measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0, gradient_GD=gradient_GD)


def permuted(ffn: FFNWeights, stats: ActivationStats, order_F: Tensor) -> tuple[FFNWeights, ActivationStats]:
    """The same FFN, its neurons stored in another order."""
    moved = replace(ffn, gate_FD=ffn.gate_FD[order_F], up_FD=ffn.up_FD[order_F], down_DF=ffn.down_DF[:, order_F])
    return moved, replace(
        stats,
        energy_F=stats.energy_F[order_F],
        massive_F=stats.massive_F[order_F],
        contribution_NF=stats.contribution_NF[:, order_F],
    )


def groups(labels_F: Tensor) -> set[frozenset[int]]:
    """The routed experts as sets of neurons: what is left when experts are numbered in another way."""
    numbers = [label for label in labels_F.unique().tolist() if label != SHARED]
    return {frozenset((labels_F == number).nonzero().flatten().tolist()) for number in numbers}


def shared_of(labels_F: Tensor) -> set[int]:
    return set((labels_F == SHARED).nonzero().flatten().tolist())


@pytest.mark.parametrize("name", partition.names())
@pytest.mark.parametrize("cut", LAYOUTS, ids=str)
def test_sizes_are_exact(name: str, cut: tuple[int, int, int]) -> None:
    ffn, stats = toy()
    labels_F = partition.find(name)(ffn, stats, Layout(*cut), seed=0)
    assert (labels_F.dtype, labels_F.shape, labels_F.device.type) == (torch.int16, (24,), "cpu")
    LayerPlan(0, labels_F, None).check(Layout(*cut))


@pytest.mark.parametrize("name", partition.names())
@pytest.mark.parametrize("degenerate", ["one neuron", "silent"])
def test_sizes_are_exact_when_neurons_cannot_be_told_apart(name: str, degenerate: str) -> None:
    ffn, inputs_TD = toy_ffn()
    value = 0.0 if degenerate == "silent" else 1.0
    same = replace(
        ffn,
        gate_FD=torch.full_like(ffn.gate_FD, value),
        up_FD=torch.full_like(ffn.up_FD, value),
        down_DF=torch.full_like(ffn.down_DF, value),
    )
    stats = measured(same, inputs_TD)
    layout = Layout(8, 2, 4)
    LayerPlan(0, partition.find(name)(same, stats, layout, seed=0), None).check(layout)


@pytest.mark.parametrize("name", partition.names())
def test_the_same_seed_gives_the_same_labels_and_inputs_are_left_alone(name: str) -> None:
    ffn, stats = toy()
    tensors = [t for record in (ffn, stats) for t in vars(record).values() if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    find = partition.find(name)
    torch.manual_seed(1)
    first = find(ffn, stats, Layout(8, 2, 4), seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, find(ffn, stats, Layout(8, 2, 4), seed=5))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_only_a_random_partition_needs_its_seed() -> None:
    ffn, stats = toy()
    random = [partition.find("random")(ffn, stats, Layout(8, 2, 4), seed=seed) for seed in (0, 1)]
    assert groups(random[0]) != groups(random[1])
    assert shared_of(random[0]) != shared_of(random[1])
    contiguous = partition.find("contiguous")(ffn, stats, Layout(8, 2, 4), seed=0)
    assert contiguous.tolist() == [-1] * 6 + [i for i in range(6) for _ in range(3)]


@pytest.mark.parametrize("name", BY_ENERGY)
def test_shared_neurons_are_those_of_most_energy(name: str) -> None:
    ffn, stats = toy()
    labels_F = partition.find(name)(ffn, stats, Layout(8, 3, 5), seed=0)
    assert shared_of(labels_F) == set(stats.energy_F.argsort(descending=True)[:9].tolist())


@pytest.mark.parametrize("name", [*BY_ENERGY, "routed"])
def test_massive_neurons_are_always_shared(name: str) -> None:
    ffn, stats = toy()
    weakest = stats.energy_F.argsort()[:3]
    stats.massive_F[weakest] = True
    labels_F = partition.find(name)(ffn, stats, Layout(8, 1, 4), seed=0)
    assert shared_of(labels_F) == set(weakest.tolist())


def planted() -> tuple[FFNWeights, ActivationStats, set[frozenset[int]]]:
    """Six loud neurons, and six groups of three that share a direction and are active in tokens along it."""
    generator = torch.Generator().manual_seed(0)
    place = torch.randperm(24, generator=generator)
    features_FD = torch.zeros(24, 8)
    features_FD[place[:6], 6] = 0.3
    for group in range(6):
        features_FD[place[6 + 3 * group : 9 + 3 * group], group] = 1.0
    noisy_FD = features_FD + 0.02 * torch.rand(24, 8, generator=generator)
    # Rows of any length, their direction counts.
    length_F1 = 0.5 + torch.rand(24, 1, generator=generator)
    down_DF = torch.rand(8, 24, generator=generator) + 0.5
    down_DF[:, place[:6]] += 30
    ffn = FFNWeights(0, noisy_FD * length_F1, noisy_FD * length_F1, down_DF, "silu")
    inputs_TD = 3 * torch.eye(8)[:6].repeat_interleave(50, dim=0)
    inputs_TD[:, 6] = 4.0
    inputs_TD += 0.1 * torch.rand(300, 8, generator=generator)
    expected = {frozenset(place[6 + 3 * group : 9 + 3 * group].tolist()) for group in range(6)}
    stats = measure(ffn, inputs_TD, Activations(ffn, inputs_TD), seed=0, gradient_GD=torch.ones(300, 8))
    return ffn, stats, expected


# One round of CMoE's, from markers of two neurons that may be alike, does not promise this.
@pytest.mark.parametrize("name", [name for name in BY_CONTENT if name != "marker"])
def test_planted_groups_are_found_in_any_order_of_neurons(name: str) -> None:
    ffn, stats, expected = planted()
    for seed in range(5):
        order_F = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        labels_F = partition.find(name)(*permuted(ffn, stats, order_F), Layout(8, 2, 3), seed=seed)
        assert {frozenset(int(order_F[i]) for i in group) for group in groups(labels_F)} == expected


@pytest.mark.parametrize("name", BY_CONTENT)
def test_the_partition_does_not_depend_on_the_order_of_neurons(name: str) -> None:
    ffn, stats = toy()
    labels_F = partition.find(name)(ffn, stats, Layout(8, 2, 4), seed=0)
    order_F = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved_F = partition.find(name)(*permuted(ffn, stats, order_F), Layout(8, 2, 4), seed=0)
    assert {frozenset(int(order_F[i]) for i in group) for group in groups(moved_F)} == groups(labels_F)
    assert {int(order_F[i]) for i in shared_of(moved_F)} == shared_of(labels_F)


def test_marker_shares_the_neurons_that_are_most_often_among_the_top_ten() -> None:
    ffn, stats = toy()
    unit_ND = stats.inputs_ND / stats.inputs_ND.norm(dim=1, keepdim=True)
    gate_FD, up_FD = (rows / rows.norm(dim=1, keepdim=True) for rows in (ffn.gate_FD, ffn.up_FD))
    score_NF = (torch.nn.functional.silu(unit_ND @ gate_FD.T) * (unit_ND @ up_FD.T)).abs()
    rate_F = torch.zeros(24)
    for row in score_NF:
        rate_F[row.argsort(descending=True)[:10]] += 1
    labels_F = partition.find("marker")(ffn, stats, Layout(8, 3, 5), seed=0)
    is_shared_F = labels_F == SHARED
    assert rate_F[is_shared_F].min() >= rate_F[~is_shared_F].max()
    assert shared_of(labels_F) != set(stats.energy_F.argsort(descending=True)[:9].tolist())
    # The first centroids are markers of the most frequent routed neurons, which therefore stay apart.
    frequent = torch.where(is_shared_F, -1.0, rate_F).argsort(descending=True, stable=True)[:5]
    assert labels_F[frequent].unique().numel() == 5


def test_gradient_follows_the_loss_and_not_the_contributions() -> None:
    """Half the neurons write where the loss does not look: they must not be shared, however loud they are."""
    ffn, stats = toy()
    gradient_ND = torch.cat([torch.ones(600, 4), torch.zeros(600, 4)], dim=1)
    down_DF = torch.zeros(8, 24)
    down_DF[:4, ::2] = 1.0
    down_DF[4:, 1::2] = 100.0
    ffn, stats = replace(ffn, down_DF=down_DF), replace(stats, gradient_ND=gradient_ND)
    labels_F = partition.find("gradient")(ffn, stats, Layout(8, 4, 6), seed=0)
    assert shared_of(labels_F) == set(range(0, 24, 2))
    with pytest.raises(ValueError, match="gradient"):
        partition.find("gradient")(ffn, replace(stats, gradient_ND=None), Layout(8, 4, 6), seed=0)


def test_gradient_gives_neurons_by_falling_importance_to_experts_with_room() -> None:
    importance_RF = torch.tensor([[9.0, 8, 7, 1], [8.5, 2, 6, 0]])
    assert gradient._greedy(importance_RF, 2).tolist() == [0, 0, 1, 1]


def kept_energy(labels_F: Tensor, stats: ActivationStats, layout: Layout) -> float:
    """Share of the contribution energy that is left when a ridge router chooses."""
    energy_NF = stats.contribution_NF.square()
    norms_NR = routed.expert_norms(energy_NF, labels_F, layout)
    scores_NR = stats.inputs_ND @ rank(cholesky(stats.inputs_ND), stats.inputs_ND, norms_NR).T
    chosen = (norms_NR.square() * choose_experts(scores_NR, layout)).sum()
    return float((chosen + energy_NF[:, labels_F == SHARED].sum()) / energy_NF.sum())


@pytest.mark.parametrize("layout", [Layout(8, 2, 4), Layout(8, 0, 3), Layout(6, 1, 3), Layout(4, 1, 2)], ids=str)
def test_routed_keeps_more_under_its_router_than_where_it_starts(layout: Layout) -> None:
    gains = []
    for seed in range(8):
        ffn, stats = toy(seed)
        kept = [
            kept_energy(partition.find(name)(ffn, stats, layout, seed=0), stats, layout)
            for name in ("energy", "routed", "random")
        ]
        # Its last round need not be its best one.
        assert kept[1] >= kept[0] - 5e-3
        assert kept[1] > kept[2]
        gains.append(kept[1] - kept[0])
    assert sum(gains) / len(gains) > 0.002


def test_routed_keeps_everything_of_planted_experts() -> None:
    ffn, stats, _ = planted()
    layout = Layout(8, 2, 3)
    found = [
        kept_energy(partition.find(name)(ffn, stats, layout, seed=0), stats, layout) for name in ("energy", "routed")
    ]
    assert found[1] >= found[0] - 1e-6
    assert found[1] > 0.999


def test_routed_is_energy_where_nothing_is_chosen() -> None:
    ffn, stats = toy()
    for layout in (Layout(8, 7, 8), Layout(8, 6, 6)):
        labels_F = [partition.find(name)(ffn, stats, layout, seed=0) for name in ("energy", "routed")]
        assert torch.equal(*labels_F)


def test_assign_keeps_the_most_that_full_experts_can() -> None:
    """Against every assignment there is of eight neurons to a shared part of four and two experts of two."""
    layout = Layout(4, 2, 3)
    kept_FE = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    best = 0.0
    for shared in itertools.combinations(range(8), 4):
        rest = [neuron for neuron in range(8) if neuron not in shared]
        for first in itertools.combinations(rest, 2):
            columns = [0 if i in shared else 1 if i in first else 2 for i in range(8)]
            best = max(best, float(kept_FE[torch.arange(8), torch.tensor(columns)].sum()))
    labels_F = routed.assign(kept_FE, layout)
    LayerPlan(0, labels_F, None).check(layout)
    assert float(kept_FE[torch.arange(8), labels_F.long() - SHARED].sum()) == pytest.approx(best)


def test_assign_without_shared_experts_and_with_huge_or_no_values() -> None:
    layout = Layout(4, 0, 2)
    for kept_FE in (torch.zeros(8, 5), torch.full((8, 5), 1e30), torch.rand(8, 5) * 1e-30):
        LayerPlan(0, routed.assign(kept_FE, layout), None).check(layout)


def test_expert_norms_add_squares() -> None:
    energy_NF = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    labels_F = torch.tensor([-1, 0, 1, 1, 0, -1, 1, 0], dtype=torch.int16)
    norms_NR = routed.expert_norms(energy_NF, labels_F, Layout(8, 2, 4))[:, :2]
    expected = torch.stack([energy_NF[:, [1, 4, 7]].sum(1), energy_NF[:, [2, 3, 6]].sum(1)], dim=1).sqrt()
    torch.testing.assert_close(norms_NR, expected)


def inertia(points: Tensor, labels: Tensor) -> float:
    return sum(
        float((points[labels == cluster] - points[labels == cluster].mean(0)).square().sum())
        for cluster in labels.unique().tolist()
    )


def test_balanced_kmeans_is_balanced_and_better_than_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(96, 5, generator=generator)
    labels = balanced_kmeans(points, 8, seed=0)
    assert torch.bincount(labels).tolist() == [12] * 8
    chance = min(inertia(points, torch.arange(96)[torch.randperm(96, generator=generator)] % 8) for _ in range(50))
    assert inertia(points, labels) < 0.8 * chance


def test_balanced_kmeans_assigns_optimally() -> None:
    """At the end no exchange of two points between clusters brings both nearer to the centroids."""
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).double()
    labels = balanced_kmeans(points, 4, seed=0)
    centroids = torch.stack([points[labels == cluster].mean(0) for cluster in range(4)])
    cost = torch.cdist(points, centroids).square()
    own = cost[torch.arange(40), labels]
    swapped = cost[:, labels] + cost[:, labels].T
    assert bool((own[:, None] + own[None, :] <= swapped + 1e-9).all())
