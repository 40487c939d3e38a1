"""The tables of `moeify eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moeify.cli.tables.columns import DataTable
from moeify.cli.tables.loops import loops_tables
from moeify.cli.tables.tasks import short_names, tasks_tables
from moeify.cli.tables.words import windows
from moeify.words import explained, listing, percent

if TYPE_CHECKING:
    from moeify.check.evaluate import Evaluation
    from moeify.check.perplexity import EvalResult
    from moeify.check.scores import Score


def eval_tables(evaluation: "Evaluation") -> tuple[Table, ...]:
    """Perplexities and other measures, then tasks, then how answers end."""
    measured = [eval_table(evaluation.results)] if evaluation.results else []
    scored = [score_table(evaluation.scores)] if evaluation.scores else []
    return (*measured, *scored, *tasks_tables(evaluation.tasks), *loops_tables(evaluation.loops))


def score_table(scores: "Sequence[Score]") -> DataTable:
    """One row a model and set of examples."""
    measures = list(dict.fromkeys(score.measure for score in scores))
    keys = ("model", "data")
    notes = "\n".join((*(explained(measure) for measure in measures), *_calibrated(scores)))
    table = DataTable("moeify eval", (*keys, *measures, "examples", "examples/s"), words=keys, notes=notes)
    short = short_names([score.model for score in scores])
    for score in scores:
        values = (f"{score.value:.4f}" if score.measure == measure else "" for measure in measures)
        speed = f"{score.examples_per_second:,.0f}"
        table.add_row(short[score.model], Path(score.data).name, *values, f"{score.num_examples:,}", speed)
    return table


def eval_table(results: "Sequence[EvalResult]") -> DataTable:
    """One row a model and text; the ratio is to the first model on the same text."""
    keys = ("model", "text")
    table = DataTable(
        "moeify eval", (*keys, results[0].measure, "ratio", "tokens", "tokens/s"), words=keys, notes=_notes(results)
    )
    first = {result.data: result.perplexity for result in reversed(results)}
    short = short_names([result.model for result in results])
    for result in results:
        table.add_row(
            short[result.model],
            Path(result.data).name,
            f"{result.perplexity:,.3f}",
            f"{result.perplexity / first[result.data]:.3f}",
            f"{result.num_tokens:,}",
            f"{result.tokens_per_second:,.0f}",
        )
    return table


def _notes(results: "Sequence[EvalResult]") -> str:
    how = {windows(result.context, result.stride) for result in results if result.context}
    measured = f"; here {how.pop()}" if len(how) == 1 else ""
    lines = [
        f"{explained(results[0].measure)}{measured}",
        "ratio: to the first model's perplexity on the same text",
        *_calibrated(results),
    ]
    short = short_names([result.model for result in results])
    for result in results:
        if result.active_share is not None:
            text = Path(result.data).name
            lines.append(f"{short[result.model]} ran {percent(result.active_share)} of its FFNs for a token of {text}")
    return "\n".join(lines)


def _calibrated(results: "Sequence[EvalResult | Score]") -> list[str]:
    short = short_names([result.model for result in results])
    own = {result.model: listing(result.calibrated_on) for result in results if result.calibrated_on}
    return [f"{short[model]} was calibrated on {texts}" for model, texts in own.items()]
