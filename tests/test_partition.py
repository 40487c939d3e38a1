"""Every partition: exact sizes, one label a neuron, the same for the same seed; and what single methods promise."""

from dataclasses import replace

import pytest
import torch
from conftest import toy_ffn
from torch import Tensor

from moeify import partition
from moeify.activations import Activations, ActivationStats, FFNWeights, measure
from moeify.partition._balanced import balanced_kmeans
from moeify.plan import SHARED, LayerPlan, Layout

# These look at what a neuron does, not at where it is stored.
BY_CONTENT = ("energy", "kmeans")
LAYOUTS = [(8, 4, 6), (8, 0, 6), (4, 3, 4), (2, 0, 1), (24, 8, 12), (8, 6, 6), (6, 1, 3)]


def toy(seed: int = 0) -> tuple[FFNWeights, ActivationStats]:
    ffn, inputs_TD = toy_ffn(seed=seed)
    return ffn, measure(ffn, Activations(ffn, inputs_TD), seed=seed)


def permuted(ffn: FFNWeights, stats: ActivationStats, order_F: Tensor) -> tuple[FFNWeights, ActivationStats]:
    """The same FFN, its neurons stored in another order."""
    moved = replace(ffn, gate_FD=ffn.gate_FD[order_F], up_FD=ffn.up_FD[order_F], down_DF=ffn.down_DF[:, order_F])
    return moved, replace(
        stats,
        energy_F=stats.energy_F[order_F],
        massive_F=stats.massive_F[order_F],
        contribution_FN=stats.contribution_FN[order_F],
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
    stats = measure(same, Activations(same, inputs_TD), seed=0)
    layout = Layout(8, 2, 4)
    LayerPlan(0, partition.find(name)(same, stats, layout, seed=0), None).check(layout)


@pytest.mark.parametrize("name", partition.names())
def test_the_same_seed_gives_the_same_labels_and_inputs_are_left_alone(name: str) -> None:
    ffn, stats = toy()
    before = [t.clone() for t in (ffn.gate_FD, ffn.down_DF, stats.energy_F, stats.contribution_FN)]
    find = partition.find(name)
    torch.manual_seed(1)
    first = find(ffn, stats, Layout(8, 2, 4), seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, find(ffn, stats, Layout(8, 2, 4), seed=5))
    after = (ffn.gate_FD, ffn.down_DF, stats.energy_F, stats.contribution_FN)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_only_a_random_partition_needs_its_seed() -> None:
    ffn, stats = toy()
    random = [partition.find("random")(ffn, stats, Layout(8, 2, 4), seed=seed) for seed in (0, 1)]
    assert groups(random[0]) != groups(random[1])
    assert shared_of(random[0]) != shared_of(random[1])
    contiguous = partition.find("contiguous")(ffn, stats, Layout(8, 2, 4), seed=0)
    assert contiguous.tolist() == [-1] * 6 + [i for i in range(6) for _ in range(3)]


@pytest.mark.parametrize("name", BY_CONTENT)
def test_shared_neurons_are_those_of_most_energy_wherever_they_are_stored(name: str) -> None:
    ffn, stats = toy()
    labels_F = partition.find(name)(ffn, stats, Layout(8, 3, 5), seed=0)
    assert shared_of(labels_F) == set(stats.energy_F.argsort(descending=True)[:9].tolist())
    order_F = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    moved = partition.find(name)(*permuted(ffn, stats, order_F), Layout(8, 3, 5), seed=0)
    assert {int(order_F[i]) for i in shared_of(moved)} == shared_of(labels_F)


@pytest.mark.parametrize("name", BY_CONTENT)
def test_massive_neurons_are_always_shared(name: str) -> None:
    ffn, stats = toy()
    weakest = stats.energy_F.argsort()[:3]
    stats.massive_F[weakest] = True
    labels_F = partition.find(name)(ffn, stats, Layout(8, 1, 4), seed=0)
    assert shared_of(labels_F) == set(weakest.tolist())


def planted(name: str) -> tuple[FFNWeights, ActivationStats, set[frozenset[int]]]:
    """Six loud neurons and six groups of three that look alike to the method and to nobody else."""
    generator = torch.Generator().manual_seed(0)
    ffn, stats = toy()
    place = torch.randperm(24, generator=generator)
    energy_F = torch.rand(24, generator=generator)
    energy_F[place[:6]] += 10
    features = torch.zeros(24, 8)
    for group in range(6):
        features[place[6 + 3 * group : 9 + 3 * group], group] = 1.0
    features += 0.02 * torch.rand(24, 8, generator=generator)
    # Rows of any length, their direction counts.
    ffn = replace(ffn, gate_FD=features * (0.5 + torch.rand(24, 1, generator=generator)))
    contribution_FN = torch.rand(24, 400, generator=generator)
    if name == "energy":
        # Each group has 50 tokens of its own; a neuron's loudness is not what groups it.
        loud = 0.5 + torch.rand(24, 1, generator=generator)
        contribution_FN = features.repeat_interleave(50, dim=1) * loud * (0.5 + contribution_FN)
    expected = {frozenset(place[6 + 3 * group : 9 + 3 * group].tolist()) for group in range(6)}
    return ffn, replace(stats, energy_F=energy_F, contribution_FN=contribution_FN), expected


@pytest.mark.parametrize("name", BY_CONTENT)
def test_planted_groups_are_found_in_any_order_of_neurons(name: str) -> None:
    ffn, stats, expected = planted(name)
    for seed in range(5):
        order_F = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        labels_F = partition.find(name)(*permuted(ffn, stats, order_F), Layout(8, 2, 4), seed=seed)
        assert {frozenset(int(order_F[i]) for i in group) for group in groups(labels_F)} == expected


@pytest.mark.parametrize("name", BY_CONTENT)
def test_the_partition_does_not_depend_on_the_order_of_neurons(name: str) -> None:
    ffn, stats = toy()
    expected = groups(partition.find(name)(ffn, stats, Layout(8, 2, 4), seed=0))
    order_F = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = groups(partition.find(name)(*permuted(ffn, stats, order_F), Layout(8, 2, 4), seed=0))
    assert {frozenset(int(order_F[i]) for i in group) for group in moved} == expected


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
