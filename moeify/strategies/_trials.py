"""The record of a search: what was measured, how much may still be measured, what was best."""

import math

from moeify.strategies import Choice, Problem

# Small problems have fewer choices than trials: a search ends after so many proposals in a row that are known.
PATIENCE = 200


class Trials:
    """Joint losses in the order of measurement. A choice is measured once; asking again costs no trial."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.losses: dict[Choice, float] = {}
        self._repeats = 0

    @property
    def open(self) -> bool:
        return len(self.losses) < self.problem.trials and self._repeats < PATIENCE

    @property
    def best(self) -> Choice:
        """Of equals the one that was measured first."""
        return min(self.losses, key=self.losses.__getitem__)

    def measure(self, choice: Choice) -> float:
        """Joint loss; inf if the model diverged. Call only while `open`."""
        self._repeats = self._repeats + 1 if choice in self.losses else 0
        if choice not in self.losses:
            loss = self.problem.joint(choice)
            self.losses[choice] = math.inf if math.isnan(loss) else loss
        return self.losses[choice]
