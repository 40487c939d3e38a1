"""Measured quality in the model cards of a run: whoever gets a checkpoint reads there what it costs."""

import re
from collections.abc import Iterator
from pathlib import Path

from moeify.cache import replacing
from moeify.check.evaluate import Evaluation
from moeify.export.model_card import code
from moeify.export.record import LAST_FILE
from moeify.words import on_one_line

TITLE = "## Measured\n"
NEXT = "## Limits\n"


def note_quality(folder: Path, evaluation: Evaluation) -> None:
    """Write what was measured of a checkpoint into its card; the same measurement gives the same card.

    Args:
        folder: of the checkpoint, as the evaluation names it.
        evaluation: of it and of the dense model, which comes first.
    """
    file = folder / LAST_FILE
    card = file.read_text(encoding="utf-8")
    section = TITLE + "\n" + "\n".join(_lines(str(folder), evaluation)) + "\n\n"
    # An earlier one goes.
    card = re.sub(rf"^{TITLE}.*?(?=^## |\Z)", "", card, count=1, flags=re.MULTILINE | re.DOTALL)
    before, limits, behind = card.partition(NEXT)
    with replacing(file) as temporary:
        temporary.write_text(f"{before}{section}{limits}{behind}", encoding="utf-8")


def _lines(model: str, evaluation: Evaluation) -> Iterator[str]:
    """Perplexities and scores, beside the dense model's."""
    dense = {row.data: row.perplexity for row in reversed(evaluation.results)}
    yield "| text or task | dense model | this model | ratio or difference |"
    yield "|---|---|---|---|"
    for row in evaluation.results:
        if row.model == model:
            name = f"perplexity of {_cell(row.data)}, {row.num_tokens:,} tokens"
            other = dense[row.data]
            yield f"| {name} | {other:,.2f} | {row.perplexity:,.2f} | {row.perplexity / other:.3f} |"
    for score in evaluation.scores:
        if score.model == model:
            name = f"{on_one_line(score.measure)} on {_cell(score.data)}, {score.num_examples:,} examples"
            yield f"| {name} | 1 | {score.value:.4f} | |"
    for task in evaluation.tasks:
        if task.model == model:
            name = f"{on_one_line(task.metric)} of {_cell(task.task)}, {task.num_questions:,} questions"
            difference = f"{task.difference:+.3f} ({task.difference_low:+.3f} to {task.difference_high:+.3f})"
            yield f"| {name} | {task.score - task.difference:.3f} | {task.score:.3f} | {difference} |"
    first = {row.model: row for row in evaluation.loops}
    if model in first and evaluation.loops[0].model != model:
        answered = evaluation.loops[0]
        for what in ("loops", "endless"):
            own, dense_count = getattr(first[model], what), getattr(answered, what)
            name = f"{what} in {answered.num_answers} answers of at most {answered.limit_tokens} tokens"
            yield f"| {name} | {dense_count} | {own} | {own - dense_count:+d} |"


def _cell(path: str) -> str:
    """The last part of a path: where it lies here says nothing elsewhere."""
    return code(Path(path).name).replace("|", "\\|")
