"""Limits of a recipe: what must hold for a run to pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeify.benchmark.models.results import ModelBench
from moeify.check.perplexity import EvalResult
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


def check_quality(recipe: Recipe, report: VerifyReport | None, evals: Sequence[EvalResult]) -> tuple[Limit, ...]:
    """`verify` as a whole, and perplexities on each text."""
    perplexity = {(result.model, result.data): result.perplexity for result in evals}
    main = judged(recipe, MAIN)
    limits = []
    if report is not None:
        failed = [check.name for check in report.checks if not check.passed]
        limits.append(Limit("verify", ", ".join(failed) or "all checks hold", "all checks hold", report.passed))
    for data in recipe.eval.data if recipe.eval else ():
        own = perplexity[main, data]
        if recipe.limits.max_ratio is not None:
            ratio = own / perplexity[recipe.model, data]
            limit = recipe.limits.max_ratio
            limits.append(Limit(f"perplexity / dense on {data}", f"{ratio:.3f}", f"<= {limit:g}", ratio <= limit))
        for name in recipe.limits.beats:
            other = perplexity[judged(recipe, name), data]
            limits.append(Limit(f"perplexity under {name} on {data}", f"{own:.3f}", f"< {other:.3f}", own < other))
    return tuple(limits)


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
