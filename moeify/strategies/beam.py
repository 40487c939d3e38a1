"""Beam search over layers from the most to the least sensitive; the joint loss decides among the last beam.

Partial choices are ranked by summed loss plus the price of what they use of the budget, the Lagrangian bound: without
a price the first layers would spend everything. Fisher 1981, https://doi.org/10.1287/mnsc.27.1.1
"""

import numpy as np

from moeify.strategies import TOLERANCE, Choice, Problem, greedy
from moeify.strategies._price import price
from moeify.strategies._repair import repair
from moeify.strategies._trials import Trials

WIDTH = 64


def choose(problem: Problem) -> Choice:
    """See the package for the contract."""
    trials = Trials(problem)
    trials.measure(greedy.choose(problem))
    for choice in sorted(_beam(problem, max(WIDTH, problem.trials)), key=problem.loss):
        if trials.open:
            trials.measure(choice)
    return trials.best


def _beam(problem: Problem, width: int) -> list[Choice]:
    """Complete choices, repaired."""
    losses = np.where(problem.exists, problem.losses, np.inf)
    priced = losses + price(problem) * np.where(problem.exists, problem.costs, 0.0)
    # What a candidate adds to the bound if it is taken.
    regrets = priced - priced.min(axis=1, keepdims=True)
    # What it takes from the budget if all layers still open get their cheapest.
    extra = problem.costs - problem.costs.min(axis=1, keepdims=True)
    room = max(0.0, problem.budget * len(losses) - problem.costs.min(axis=1).sum()) + TOLERANCE
    spread = np.where(problem.exists, problem.losses, -np.inf).max(axis=1) - losses.min(axis=1)
    choices, regret, used = np.zeros((1, len(losses)), dtype=np.int64), np.zeros(1), np.zeros(1)
    for layer in np.argsort(-spread, kind="stable"):
        total = np.where(used[:, None] + extra[layer] <= room, regret[:, None] + regrets[layer], np.inf)
        kept = np.argsort(total, axis=None, kind="stable")[:width]
        kept = kept[np.isfinite(total.ravel()[kept])]
        parents, candidates = np.unravel_index(kept, total.shape)
        choices, used, regret = choices[parents], used[parents] + extra[layer, candidates], total[parents, candidates]
        choices[:, layer] = candidates
    return [repair(problem, tuple(choice)) for choice in choices.tolist()]
