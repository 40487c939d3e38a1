"""From every layer at its best down to the budget, one step at a time: the one that the joint loss says loses least.

As SLEB drops blocks (https://arxiv.org/abs/2402.09025), with steps of any candidates ranked by loss per cost. Losses of
single layers are the first guess of every step. A step is measured before it is taken, and taken if no guess of another
is lower: what a step loses mostly grows with the steps before it, so that an old guess is seldom too high (Minoux 1978,
https://doi.org/10.1007/BFb0006528). Without trials left, guesses decide.
"""

import math

import numpy as np

from moeify.strategies import Choice, Problem, greedy
from moeify.strategies._repair import fill


def choose(problem: Problem) -> Choice:
    """See the package for the contract."""
    descent = _Descent(problem)
    while not problem.fits(descent.choice):
        descent.step()
    ends = dict.fromkeys([greedy.choose(problem), fill(problem, descent.choice)])
    # Of a single trial greedy's is left, as of every strategy.
    return min(list(ends)[: problem.trials], key=descent.joint)


class _Descent:
    """A choice on its way down, and a guess of what each step from it loses.

    Two trials are kept for the end.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self.choice = problem, problem.best
        self._loss = problem.loss(self.choice)
        losses = np.where(problem.exists, problem.losses, np.inf)
        # L x C, over the loss of the layer's own candidate.
        self._guesses = losses - losses[np.arange(len(losses)), self.choice][:, None]
        self._joint: dict[Choice, float] = {}

    def joint(self, choice: Choice) -> float:
        """Measured, once; of a model that diverged it is infinite."""
        if choice not in self._joint:
            loss = self._problem.joint(choice)
            self._joint[choice] = math.inf if math.isnan(loss) else loss
        return self._joint[choice]

    def step(self) -> None:
        """Take the step that loses least per cost."""
        measured: dict[tuple[int, int], float] = {}
        # The losses of single layers are measured themselves: of the first step they are no guess.
        while self.choice != self._problem.best and len(self._joint) < self._problem.trials - 2:
            step = layer, candidate = self._lowest()
            if step in measured:
                break
            measured[step] = self.joint((*self.choice[:layer], candidate, *self.choice[layer + 1 :]))
            self._guesses[step] = measured[step] - self._loss
        layer, candidate = self._lowest()
        lost = self._guesses[layer, candidate]
        self._loss = measured.get((layer, candidate), self._loss + lost)
        if np.isfinite(lost):
            self._guesses[layer] -= lost
        self.choice = (*self.choice[:layer], candidate, *self.choice[layer + 1 :])

    def _lowest(self) -> tuple[int, int]:
        """Layer and cheaper candidate with the lowest guess per cost."""
        costs, layers = self._problem.costs, np.arange(len(self.choice))
        spared = costs[layers, self.choice][:, None] - costs
        # A cheaper one comes before all others, whatever it loses.
        rate = np.where(spared > 0, np.finfo(np.float64).max, np.inf)
        np.divide(self._guesses, spared, out=rate, where=(spared > 0) & np.isfinite(self._guesses))
        layer, candidate = np.unravel_index(rate.argmin(), rate.shape)
        return int(layer), int(candidate)
