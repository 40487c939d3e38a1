"""The steps that save most summed loss per cost, up from the cheapest choice and down from the best; the default.

The better of both. Where losses are convex in cost, all steps but the last are those of the linear relaxation.
Dyer 1984, https://doi.org/10.1007/BF02591729; Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11.
"""

from moeify.strategies import Choice, Problem
from moeify.strategies._repair import fill, repair


def choose(problem: Problem) -> Choice:
    """See the package for the contract."""
    up = fill(problem, problem.cheapest)
    return min(up, repair(problem, problem.best), key=problem.loss)
