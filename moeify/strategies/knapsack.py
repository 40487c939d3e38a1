"""The lowest summed loss there is: the multiple-choice knapsack by dynamic programming over Pareto fronts.

Of the partial choices only those stay that no other one beats in both cost and loss, that fit, and whose Lagrangian
bound is below greedy's loss; costs need no common step. 80 layers of 20 candidates take well below a second.
Nemhauser and Ullmann 1969, https://doi.org/10.1287/mnsc.15.9.494
"""

import numpy as np
from numpy.typing import NDArray

from moeify.strategies import TOLERANCE, Choice, Problem, greedy
from moeify.strategies._price import price

# Costs are compared to so many digits, lest 1/3 + 2/3 and 1 make two states of one.
DIGITS = 12
# Only losses in proportion to costs without a common step need more states; beyond, near ones are merged.
STATES = 20_000


def choose(problem: Problem) -> Choice:
    """See the package for the contract."""
    first, multiplier = greedy.choose(problem), price(problem)
    losses = np.where(problem.exists, problem.losses, np.inf)
    # Half the tolerance is left for rounding.
    budget = (problem.budget + TOLERANCE / 2) * len(losses)
    # What the layers that are still open add to the bound at least.
    least = (losses + multiplier * np.where(problem.exists, problem.costs, 0.0)).min(axis=1)
    ahead = np.append(least[::-1].cumsum()[::-1][1:], 0.0)
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[NDArray[np.intp]] = []
    for layer, (costs_C, losses_C) in enumerate(zip(problem.costs, losses, strict=True)):
        cost = np.round(cost[:, None] + costs_C, DIGITS).ravel()
        loss = (loss[:, None] + losses_C).ravel()
        kept = np.flatnonzero(cost <= budget)
        kept = kept[loss[kept] + ahead[layer] + multiplier * (cost[kept] - budget) < problem.loss(first)]
        kept = kept[np.lexsort((loss[kept], cost[kept]))]
        kept = kept[np.diff(np.minimum.accumulate(loss[kept]), prepend=np.inf) < 0]
        if len(kept) > STATES:
            # The last of each group loses least.
            kept = kept[np.diff(np.floor(cost[kept] / budget * STATES), append=np.inf) > 0]
        if not len(kept):
            return first
        cost, loss = cost[kept], loss[kept]
        steps.append(kept)
    return _trace(steps, losses.shape[1])


def _trace(steps: list[NDArray[np.intp]], candidates: int) -> Choice:
    """Back from the last state, which loses least, to the first."""
    choice, state = [], -1
    for kept in reversed(steps):
        state, candidate = divmod(int(kept[state]), candidates)
        choice.append(candidate)
    return tuple(reversed(choice))
