"""Limits of a recipe: what must hold for a run to pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moeify.benchmark.models.results import ModelBench
from moeify.check.evaluate import Evaluation
from moeify.check.verify import VerifyReport
from moeify.recipes.model import Recipe
from moeify.recipes.names import MAIN, TRAINED


@dataclass(frozen=True)
class Limit:
    """One limit and how it came out."""

    name: str
    measured: str
    allowed: str
    passed: bool


def judged(recipe: Recipe, name: str) -> str:
    """The folder that limits look at."""
    return str(recipe.out / (name + TRAINED if name in recipe.trained else name))


def check_quality(recipe: Recipe, report: VerifyReport | None, evaluation: Evaluation) -> tuple[Limit, ...]:
    """`verify` as a whole, the measure of the models' kind on each source, and scores of tasks."""
    limits = []
    if report is not None:
        failed = [check.name for check in report.checks if not check.passed]
        limits.append(Limit("verify", ", ".join(failed) or "all checks hold", "all checks hold", report.passed))
    return (*limits, *_perplexities(recipe, evaluation), *_scores(recipe, evaluation), *_tasks(recipe, evaluation))


def _perplexities(recipe: Recipe, evaluation: Evaluation) -> Iterator[Limit]:
    perplexity = {(result.model, result.data): result.perplexity for result in evaluation.results}
    main = judged(recipe, MAIN)
    for data in dict.fromkeys(result.data for result in evaluation.results):
        own = perplexity[main, data]
        if recipe.limits.max_ratio is not None:
            ratio = own / perplexity[recipe.model, data]
            limit = recipe.limits.max_ratio
            yield Limit(f"perplexity / dense on {data}", f"{ratio:.3f}", f"<= {limit:g}", ratio <= limit)
        for name in recipe.limits.beats:
            other = perplexity[judged(recipe, name), data]
            yield Limit(f"perplexity under {name} on {data}", f"{own:.3f}", f"< {other:.3f}", own < other)


def _scores(recipe: Recipe, evaluation: Evaluation) -> Iterator[Limit]:
    """Of models that no perplexity is of, such as the cosine of features: more is better."""
    values = {(score.model, score.data): score for score in evaluation.scores}
    for data in dict.fromkeys(score.data for score in evaluation.scores):
        own = values[judged(recipe, MAIN), data]
        for name in recipe.limits.beats:
            other = values[judged(recipe, name), data].value
            passed = own.value > other
            yield Limit(f"{own.measure} over {name} on {data}", f"{own.value:.4f}", f"> {other:.4f}", passed)


def _tasks(recipe: Recipe, evaluation: Evaluation) -> Iterator[Limit]:
    """What a score, a share of right answers, may lose to the dense model's."""
    limit = recipe.limits.max_drop
    if limit is None:
        return
    for task in evaluation.tasks:
        if task.model == judged(recipe, MAIN) and task.chance is not None:
            name = f"{task.metric} on {task.task} under dense"
            yield Limit(name, f"{-task.difference:.3f}", f"<= {limit:g}", -task.difference <= limit)


def check_times(recipe: Recipe, measured: ModelBench | None) -> Iterator[Limit]:
    """Each regime against its limit, with the noise taken into account."""
    main = Path(judged(recipe, MAIN)).name
    for verdict in measured.verdicts if measured else ():
        limit = recipe.limits.max_times.get(verdict.phase)
        if verdict.model != main or limit is None:
            continue
        regime = (verdict.implementation, verdict.phase, verdict.batch, verdict.prompt_tokens)
        assert measured is not None
        low = next(
            row.time_over_dense_low
            for row in measured.speed
            if row.model == main and (row.implementation, row.phase, row.batch, row.prompt_tokens) == regime
        )
        name = f"{verdict.phase} time / dense at {verdict.batch} x {verdict.prompt_tokens}"
        passed = low is None or low <= limit
        yield Limit(name, f"{verdict.time_over_dense:.3f}", f"<= {limit:g} within noise", passed)
