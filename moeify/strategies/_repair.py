"""Make any choice fit the budget and use it up, by single-layer steps ranked by loss per cost."""

import numpy as np

from moeify.strategies import TOLERANCE, Choice, Floats, Problem

# Stands for "costs nothing": such steps come first, those that save most before the others.
FREE = 1e-12


def repair(problem: Problem, choice: Choice, rng: np.random.Generator | None = None) -> Choice:
    """The choice, downgraded until it fits and filled.

    Args:
        rng: weighs layers at random, so that a search is not led back to the greedy choice every time.
    """
    losses = problem.losses
    if rng is not None:
        losses = losses * rng.lognormal(size=(len(losses), 1))
    return fill(problem, downgrade(problem, choice, losses), losses)


def downgrade(problem: Problem, choice: Choice, losses: Floats) -> Choice:
    """Until the choice fits: the step to a cheaper candidate that loses least per cost."""
    found, layers = np.array(choice), np.arange(len(choice))
    while not problem.fits(tuple(found.tolist())):
        spared = problem.costs[layers, found][:, None] - problem.costs
        lost = losses - losses[layers, found][:, None]
        rate = np.full(spared.shape, np.inf)
        np.divide(lost, spared, out=rate, where=spared > 0)
        layer, candidate = np.unravel_index(rate.argmin(), rate.shape)
        found[layer] = candidate
    return tuple(found.tolist())


def fill(problem: Problem, choice: Choice, losses: Floats) -> Choice:
    """As long as one fits: the step to a candidate with less loss that saves most per cost."""
    found, layers = np.array(choice), np.arange(len(choice))
    while True:
        costs_L = problem.costs[layers, found]
        extra = problem.costs - costs_L[:, None]
        saved = losses[layers, found][:, None] - losses
        possible = (saved > 0) & (extra <= problem.budget * len(choice) - costs_L.sum() + TOLERANCE)
        if not possible.any():
            return tuple(found.tolist())
        rate = np.full(extra.shape, -np.inf)
        np.divide(saved, np.maximum(extra, FREE), out=rate, where=possible)
        layer, candidate = np.unravel_index(rate.argmax(), rate.shape)
        found[layer] = candidate


def random_choice(problem: Problem, rng: np.random.Generator) -> Choice:
    """Any candidate that exists in each layer, whatever it costs."""
    return tuple(int(rng.choice(np.flatnonzero(row))) for row in problem.exists)
