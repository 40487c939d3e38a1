"""The same candidate in every layer, the baseline: of those the budget allows the one with the lowest summed loss."""

import numpy as np

from moeify.errors import InputError
from moeify.strategies import Choice, Problem


def choose(problem: Problem) -> Choice:
    """See the package for the contract.

    Raises:
        InputError: no candidate exists in every layer and fits.
    """
    layers, candidates = problem.costs.shape
    choices = [(candidate,) * layers for candidate in range(candidates)]
    if affordable := list(filter(problem.fits, choices)):
        return min(affordable, key=problem.loss)
    everywhere = np.flatnonzero(problem.exists.all(axis=0))
    raise InputError(
        f"{everywhere.size} of {problem.costs.shape[1]} candidates exist in every layer and none of them fits a budget "
        f"of {problem.budget:.4g}, expected at least one",
        "use the strategy greedy, which may mix candidates, or raise the budget",
    )
