"""Make any choice fit the budget and use it up, by single-layer steps ranked by loss per cost."""

import numpy as np

from moeify.strategies import TOLERANCE, Choice, Problem

# Stands for "costs nothing": such steps come first, those that save most before the others.
FREE = 1e-12


def repair(problem: Problem, choice: Choice) -> Choice:
    """The choice, downgraded until it fits and filled."""
    return fill(problem, downgrade(problem, choice))


def downgrade(problem: Problem, choice: Choice) -> Choice:
    """Until the choice fits: the step to a cheaper candidate that loses least per cost."""
    taken, layers = np.array(choice), np.arange(len(choice))
    while not problem.fits(tuple(taken.tolist())):
        spared = problem.costs[layers, taken][:, None] - problem.costs
        lost = problem.losses - problem.losses[layers, taken][:, None]
        rate = np.full(spared.shape, np.inf)
        np.divide(lost, spared, out=rate, where=spared > 0)
        layer, candidate = np.unravel_index(rate.argmin(), rate.shape)
        taken[layer] = candidate
    return tuple(taken.tolist())


def fill(problem: Problem, choice: Choice) -> Choice:
    """As long as one fits: the step to a candidate with less loss that saves most per cost."""
    taken, layers = np.array(choice), np.arange(len(choice))
    while True:
        costs_L = problem.costs[layers, taken]
        extra = problem.costs - costs_L[:, None]
        saved = problem.losses[layers, taken][:, None] - problem.losses
        possible = (saved > 0) & (extra <= problem.budget * len(choice) - costs_L.sum() + TOLERANCE)
        if not possible.any():
            return tuple(taken.tolist())
        rate = np.full(extra.shape, -np.inf)
        np.divide(saved, np.maximum(extra, FREE), out=rate, where=possible)
        layer, candidate = np.unravel_index(rate.argmax(), rate.shape)
        taken[layer] = candidate
