"""Random choices repaired to the budget, and greedy's, best by joint loss: what a search has to beat.

Bergstra and Bengio 2012, https://jmlr.org/papers/v13/bergstra12a.html
"""

import numpy as np

from moeify.strategies import Choice, Problem, greedy
from moeify.strategies._repair import random_choice, repair
from moeify.strategies._trials import Trials


def choose(problem: Problem) -> Choice:
    """See the package for the contract."""
    rng, trials = np.random.default_rng(problem.seed), Trials(problem)
    trials.measure(greedy.choose(problem))
    while trials.open:
        trials.measure(repair(problem, random_choice(problem, rng), rng))
    return trials.best
