"""What a unit of the budget is worth: the multiplier of the Lagrangian relaxation, which bounds every choice."""

import numpy as np

from moeify.strategies import Problem


def price(problem: Problem) -> float:
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
