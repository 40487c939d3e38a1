"""The result of a task. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskResult:
    """One model on one task by one metric; intervals are 95 %.

    That of a score of rights and wrongs is Wilson's (1927), others come from the bootstrap over questions.

    Args:
        model, task: what was measured on what.
        metric: `acc` takes the likeliest choice, `acc_norm` the likeliest for its length; others are lm-eval's.
        num_questions: that were answered.
        score, score_low, score_high: mean over the questions; an accuracy of 0.25 is a quarter of them.
        difference, difference_low, difference_high: to the first model's score; the same questions are drawn for both.
        chance: score of a random choice; None where there is none.
    """

    model: str
    task: str
    metric: str
    num_questions: int
    score: float
    score_low: float
    score_high: float
    difference: float
    difference_low: float
    difference_high: float
    chance: float | None
