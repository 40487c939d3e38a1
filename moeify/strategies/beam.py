"""The choices of the lowest summed loss, greedy's first; of these the one with the lowest joint loss.

A beam search over layers, from the most to the least sensitive, finds them. Partial choices are ranked by summed loss
plus the price of their part of the budget, the Lagrangian bound: without a price the first layers would spend
everything. Fisher 1981, https://doi.org/10.1287/mnsc.27.1.1
"""

import math

import numpy as np

from moeify.strategies import TOLERANCE, Choice, Problem, greedy
from moeify.strategies._repair import repair

WIDTH = 64


def choose(problem: Problem) -> Choice:
    """See the package for the contract."""
    ranked = sorted(_beam(problem, max(WIDTH, problem.trials)), key=problem.loss)
    measured = list(dict.fromkeys([greedy.choose(problem), *ranked]))[: problem.trials]
    joint = {choice: problem.joint(choice) for choice in measured}
    # A model that diverged has no loss.
    return min(joint, key=lambda choice: math.inf if math.isnan(joint[choice]) else joint[choice])


def _beam(problem: Problem, width: int) -> list[Choice]:
    """Complete choices, repaired."""
    losses = np.where(problem.exists, problem.losses, np.inf)
    priced = losses + _price(problem) * np.where(problem.exists, problem.costs, 0.0)
    # The rise of the bound if a candidate is taken.
    regrets = priced - priced.min(axis=1, keepdims=True)
    # Its part of the budget if all layers still open get their cheapest.
    extra = problem.costs - problem.costs.min(axis=1, keepdims=True)
    room = max(0.0, problem.budget * len(losses) - problem.costs.min(axis=1).sum()) + TOLERANCE
    spread = np.where(problem.exists, problem.losses, -np.inf).max(axis=1) - losses.min(axis=1)
    choices, regret, used = np.zeros((1, len(losses)), dtype=np.int64), np.zeros(1), np.zeros(1)
    for layer in np.argsort(-spread, kind="stable"):
        total = np.where(used[:, None] + extra[layer] <= room, regret[:, None] + regrets[layer], np.inf)
        lowest = np.argsort(total, axis=None, kind="stable")[:width]
        lowest = lowest[np.isfinite(total.ravel()[lowest])]
        parents, candidates = np.unravel_index(lowest, total.shape)
        choices, used, regret = choices[parents], used[parents] + extra[layer, candidates], total[parents, candidates]
        choices[:, layer] = candidates
    return [repair(problem, tuple(choice)) for choice in choices.tolist()]


def _price(problem: Problem) -> float:
    """Loss per cost at which every layer, on its own, takes what the budget allows together; by bisection."""
    if problem.fits(problem.best):
        return 0.0
    low, high = 0.0, 1.0
    losses = np.where(problem.exists, problem.losses, np.inf)
    costs = np.where(problem.exists, problem.costs, 0.0)

    def fits(multiplier: float) -> bool:
        return problem.fits(tuple((losses + multiplier * costs).argmin(axis=1).tolist()))

    # Beyond some price every layer takes its cheapest, unless two differ by less than rounding.
    while not fits(high) and high < 1e12:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
