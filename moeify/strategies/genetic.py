"""A genetic search by joint loss: tournaments, crossover and mutation by layer, repair to the budget.

Steady-state: a child replaces the worst of the population at once, which suits few and expensive measurements.
Chu and Beasley 1998, https://doi.org/10.1023/A:1009642405419
"""

import numpy as np

from moeify.strategies import Choice, Problem, greedy, uniform
from moeify.strategies._repair import random_choice, repair
from moeify.strategies._trials import Trials

POPULATION = 16
TOURNAMENT = 3


def choose(problem: Problem) -> Choice:
    """See the package for the contract."""
    rng, trials = np.random.default_rng(problem.seed), Trials(problem)
    size = max(2, min(POPULATION, problem.trials // 4))
    for seed in (greedy.choose(problem), *uniform.affordable(problem)[: size // 2]):
        if trials.open:
            trials.measure(seed)
    while trials.open and len(trials.losses) < size:
        trials.measure(repair(problem, random_choice(problem, rng), rng))
    while trials.open:
        population = sorted(trials.losses, key=trials.losses.__getitem__)[:size]
        trials.measure(repair(problem, _child(problem, population, rng), rng))
    return trials.best


def _child(problem: Problem, population: list[Choice], rng: np.random.Generator) -> Choice:
    """Every layer from one of two parents; on average one layer is drawn anew.

    Args:
        population: best first, so that the lowest index wins a tournament.
    """
    layers = len(problem.costs)
    mother, father = (population[rng.integers(len(population), size=TOURNAMENT).min()] for _ in range(2))
    child = np.where(rng.random(layers) < 0.5, mother, father)
    return tuple(np.where(rng.random(layers) < 1 / layers, random_choice(problem, rng), child).tolist())
