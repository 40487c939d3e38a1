"""Every strategy: the budget, the trials, reproducibility; which are exact and which see that layers interact."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moeify import strategies
from moeify.errors import InputError, UsageError
from moeify.strategies import Choice, Floats, Problem, greedy, uniform
from moeify.strategies._repair import fill, repair

# Those that measure more than one choice.
SEARCHES = ["beam", "stepwise"]


def make(costs: Floats, losses: Floats, budget: float, *, trials: int = 20, seed: int = 0) -> Problem:
    """The joint loss is the sum."""
    layers = np.arange(len(costs))
    return Problem(costs, losses, budget, lambda choice: float(losses[layers, choice].sum()), trials, seed)


def convex(layers: int, candidates: int, budget: float, seed: int = 0) -> Problem:
    """Losses fall with cost, ever more slowly; layers differ in how much."""
    rng = np.random.default_rng(seed)
    costs = np.tile(np.arange(1, candidates + 1) / candidates, (layers, 1))
    return make(costs, rng.exponential(size=(layers, 1)) * (1 - costs) ** 2, budget)


def scattered(seed: int) -> Problem:
    """Small, without any order in it; some candidates are missing."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 6)), int(rng.integers(1, 5)))
    costs = rng.integers(1, 17, shape) / 16 if seed % 2 else rng.random(shape)
    costs[:, 1:][rng.random((shape[0], shape[1] - 1)) < 0.2] = np.inf
    losses = rng.random(shape) * 10.0 ** rng.uniform(-5, 0, (shape[0], 1))
    least, most = costs.min(axis=1).mean(), np.where(np.isfinite(costs), costs, 0).max(axis=1).mean()
    return make(costs, losses, float(least + rng.random() * max(0, most - least)), seed=seed)


def interacting(trials: int = 200, seed: int = 0) -> Problem:
    """Summed losses spare layers 0 and 1 alike; jointly, cutting both of them is what hurts."""
    costs = np.tile([0.5, 1.0], (6, 1))
    losses = np.array([[0.010, 0], [0.011, 0], [0.012, 0], [0.013, 0], [0.014, 0], [0.015, 0]])

    def joint(choice: Choice) -> float:
        return float(losses[np.arange(6), choice].sum()) + (choice[0] == choice[1] == 0)

    return Problem(costs, losses, 0.75, joint, trials, seed)


def every_choice(problem: Problem) -> list[Choice]:
    layers, candidates = problem.costs.shape
    return [choice for choice in itertools.product(range(candidates), repeat=layers) if problem.fits(choice)]


def alike(problem: Problem) -> list[Choice]:
    layers, candidates = problem.costs.shape
    return [(candidate,) * layers for candidate in range(candidates)]


def lower_bound(problem: Problem) -> float:
    """No choice within the budget has a lower summed loss (Lagrangian relaxation)."""
    prices = np.linspace(0, 10, 2001)
    spent = problem.budget * len(problem.costs)
    return max(float((problem.losses + price * problem.costs).min(axis=1).sum() - price * spent) for price in prices)


def record(name: str, problem: Problem) -> tuple[Choice, list[Choice]]:
    """What is chosen, and everything that was measured."""
    calls: list[Choice] = []
    counted = replace(problem, joint=lambda choice: calls.append(choice) or problem.joint(choice))
    return strategies.find(name)(counted), calls


@pytest.mark.parametrize("name", strategies.names())
@pytest.mark.parametrize("seed", range(8))
def test_a_choice_exists_fits_and_is_the_same_again(name: str, seed: int) -> None:
    problem = scattered(seed)
    if name == "uniform" and not any(choice in every_choice(problem) for choice in alike(problem)):
        pytest.skip("no candidate is everywhere")
    found, calls = record(name, problem)
    assert found in every_choice(problem)
    assert all(type(candidate) is int for candidate in found)
    # A step on the way may still be above the budget; nothing is measured that does not exist.
    assert all(np.isfinite(problem.cost(choice)) for choice in calls)
    assert name == "stepwise" or all(problem.fits(choice) for choice in calls)
    np.random.seed(99)
    assert record(name, problem) == (found, calls)


@pytest.mark.parametrize("name", strategies.names())
@pytest.mark.parametrize("trials", [1, 2, 7, 40])
def test_the_joint_loss_is_called_as_often_as_allowed_and_never_twice_for_a_choice(name: str, trials: int) -> None:
    _, calls = record(name, replace(convex(8, 4, 0.5), trials=trials))
    assert len(set(calls)) == len(calls)
    if name not in SEARCHES:
        assert not calls
    else:
        # It measures its last beam, which holds no more than there are choices of low loss.
        assert 1 <= len(calls) <= trials


@pytest.mark.parametrize("name", strategies.names())
def test_nothing_is_random(name: str) -> None:
    first, second = (record(name, replace(convex(8, 4, 0.5), seed=seed)) for seed in (0, 1))
    assert first == second


@pytest.mark.parametrize("name", strategies.names())
def test_one_candidate_leaves_no_choice(name: str) -> None:
    assert strategies.find(name)(make(np.full((5, 1), 0.5), np.ones((5, 1)), 0.5)) == (0,) * 5


@pytest.mark.parametrize("name", strategies.names())
def test_one_layer_takes_the_best_it_can_pay(name: str) -> None:
    costs = np.array([[0.25, 0.5, 0.75, np.inf, 0.5]])
    losses = np.array([[3.0, 2.0, 1.0, 0.0, 1.5]])
    assert strategies.find(name)(make(costs, losses, 0.6)) == (4,)


@pytest.mark.parametrize("name", strategies.names())
def test_a_budget_for_everything_takes_the_best_of_each_layer(name: str) -> None:
    assert strategies.find(name)(convex(6, 4, 1.0)) == (3,) * 6


@pytest.mark.parametrize("name", strategies.names())
def test_a_budget_that_rounding_exceeds_is_kept(name: str) -> None:
    costs = np.tile([0.05, 0.1], (3, 1))
    assert costs[:, 1].mean() > 0.1
    assert strategies.find(name)(make(costs, 1 - costs, 0.1)) == (1, 1, 1)
    assert strategies.find(name)(make(costs, 1 - costs, 0.1 - 1e-6)) != (1, 1, 1)


def test_filling_allows_for_rounding_as_well() -> None:
    problem = make(np.tile([0.05, 0.1], (3, 1)), np.tile([1.0, 0.0], (3, 1)), 0.1 - 1e-12)
    assert fill(problem, problem.cheapest) == (1, 1, 1)


@pytest.mark.parametrize("value", [np.inf, np.nan, 0.0])
@pytest.mark.parametrize("name", strategies.names())
def test_the_loss_of_a_missing_candidate_is_ignored(name: str, value: float) -> None:
    problem = convex(5, 3, 1.0)
    costs, losses = problem.costs.copy(), problem.losses.copy()
    # Not the same one everywhere, but uniform needs one that is.
    costs[0, 1], losses[0, 1] = np.inf, value
    costs[3, 0], losses[3, 0] = np.inf, value
    assert strategies.find(name)(make(costs, losses, 1.0)) == (2,) * 5


def test_a_budget_below_the_cheapest_says_what_would_do() -> None:
    with pytest.raises(UsageError, match=r"cheapest choice keeps 0\.25 .* budget is 0\.2$") as caught:
        convex(4, 4, 0.2)
    assert "at least 0.25" in caught.value.hint
    with pytest.raises(UsageError, match="budget is nan"):
        convex(4, 4, float("nan"))


def test_a_problem_that_is_none_is_refused() -> None:
    costs, losses = np.full((2, 2), 0.5), np.ones((2, 2))
    with pytest.raises(InputError, match=r"\(2, 2\) and losses \(2, 1\)"):
        make(costs, losses[:, :1], 1)
    with pytest.raises(InputError, match="layer 1 has no candidate"):
        make(np.array([[0.5, 0.5], [np.inf, np.inf]]), losses, 1)
    with pytest.raises(InputError, match="layer 1 loses nan nats under candidate 0"):
        make(costs, np.array([[1, 1], [np.nan, 1]]), 1)
    with pytest.raises(UsageError, match="trials is 0"):
        make(costs, losses, 1, trials=0)


def test_uniform_says_when_no_candidate_is_everywhere() -> None:
    costs = np.array([[0.5, np.inf], [np.inf, 0.5]])
    problem = make(costs, np.ones((2, 2)), 0.5)
    with pytest.raises(InputError, match="0 of 2 candidates exist in every layer") as caught:
        uniform.choose(problem)
    assert "greedy" in caught.value.hint
    assert greedy.choose(problem) == (0, 1)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_near_the_optimum_of_a_convex_problem(seed: int) -> None:
    problem = convex(30, 8, 0.6, seed)
    best = lower_bound(problem)
    assert best <= problem.loss(greedy.choose(problem)) * (1 + 1e-9) <= 1.02 * best
    # The baseline is far off: the test can fail.
    assert problem.loss(uniform.choose(problem)) > 1.3 * best


def test_greedy_is_optimal_where_steps_cost_the_same_and_the_budget_is_a_multiple() -> None:
    problem = convex(6, 4, 0.5)
    assert problem.loss(greedy.choose(problem)) == pytest.approx(min(map(problem.loss, every_choice(problem))))


def test_greedy_needs_both_directions() -> None:
    down = make(np.array([[6, 6, 8], [2, 3, 7]]) / 8, np.array([[4.0, 2, 0], [9, 5, 1]]), 7 / 8)
    up = make(np.array([[1, 1, 5], [4, 6, 7]]) / 8, np.array([[7.0, 7, 1], [9, 6, 6]]), 5 / 8)
    assert (down.loss(fill(down, down.cheapest)), down.loss(greedy.choose(down))) == (5, 3)
    assert (up.loss(repair(up, up.best)), up.loss(greedy.choose(up))) == (13, 10)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("seed", range(3))
def test_searches_find_an_interaction_that_sums_hide(name: str, seed: int) -> None:
    problem = interacting(seed=seed)
    assert problem.joint(greedy.choose(problem)) > 1
    found = strategies.find(name)(problem)
    assert found == min(every_choice(problem), key=problem.joint)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("trials", [1, 5, 30])
def test_searches_are_never_worse_than_greedy(name: str, trials: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        losses = {choice: float(rng.random()) for choice in itertools.product(range(3), repeat=4)}
        problem = replace(convex(4, 3, 0.7, seed), joint=losses.__getitem__, trials=trials, seed=seed)
        found = strategies.find(name)(problem)
        assert losses[found] <= losses[greedy.choose(problem)]
        assert trials > 1 or found == greedy.choose(problem)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_model_that_diverges_is_not_chosen(name: str) -> None:
    problem = interacting()
    first = greedy.choose(problem)
    bad = replace(problem, joint=lambda choice: float("nan") if choice == first else problem.joint(choice))
    assert strategies.find(name)(bad) != first


def test_the_beam_is_near_the_optimum_also_without_greedy() -> None:
    problem = convex(30, 8, 0.6)
    _, (_, *choices) = record("beam", problem)
    assert len(choices) > 10
    assert min(map(problem.loss, choices)) < 1.01 * lower_bound(problem)


def test_repair_leaves_a_choice_alone_that_is_full() -> None:
    problem = convex(12, 6, 0.55)
    found = greedy.choose(problem)
    assert repair(problem, found) == found
