"""Methods side by side: every one on the same calibration tokens, the same evaluation text, in one run.

Losses of finished methods are kept in the cache, so that a run that was stopped goes on.

A language model is judged by its perplexity; another by how far its outputs move from the dense model's, see
convert/output_change.py.

Legend: T tokens, B blocks of C tokens, L losses a block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from moeify.cache import cache_dir, check_place
from moeify.check.bootstrap import mean_of, mean_ratio, perplexity_of, perplexity_ratio
from moeify.check.calibrated import warn_of_kind
from moeify.check.compare_entries import Entries, Entry, Result, measured
from moeify.check.evaluate import suited
from moeify.check.methods import REFERENCE, methods
from moeify.check.perplexity import warn_of_few, whole_blocks
from moeify.check.tasks import Tasks
from moeify.check.tasks_results import TaskResult
from moeify.check.tasks_rows import TaskRows
from moeify.check.trials import Trials
from moeify.command_line import names_of, several
from moeify.convert.output_change import PERPLEXITY, measure_of
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.texts import Blocks, calibration_inputs, dictated
from moeify.data.examples import EXAMPLES
from moeify.data.text import evaluation_tokens
from moeify.errors import UsageError, unknown
from moeify.models.dense import DenseModel, open_dense
from moeify.models.heads import check_language_model
from moeify.models.inputs import Inputs, num_blocks, one_behind_other
from moeify.options import CompareOptions, EvalOptions, Names, SplitOptions, Track
from moeify.progress import shown
from moeify.readable import Readable
from moeify.results import check_writable, write


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Args:
        method: its name.
        budget: share of the FFN parameters that a token uses; one for the dense model.
        value, low, high: the perplexity over all evaluation tokens, with its confidence interval (bootstrap over
            blocks); of what is no language model, the mean of `Comparison.measure`.
        ratio, ratio_low, ratio_high: to static pruning with refit at the same budget; the same blocks are drawn for
            both.
        gap_closed: share of the distance in log-perplexity, or that mean, from static + refit to dense.
        texts: perplexity, or that mean, on each text.
        diagnostics: means over the cut layers of what the fits measured.
    """

    method: str
    budget: float
    value: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    gap_closed: float
    texts: Mapping[str, float]
    diagnostics: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class Comparison(Readable):
    """The whole table and what it was measured on; `tasks` name the method and, of several budgets, which.

    Args:
        measure: perplexity; or KL, or feature error (1 - cosine of the last hidden states), both to the dense model.
    """

    model: str
    rows: tuple[Row, ...]
    calibration: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    tasks: tuple[TaskResult, ...] = ()
    measure: str = PERPLEXITY


def compare(
    model: str | Path | DenseModel,
    budgets: float | Sequence[float] = CompareOptions.budget,
    data: Names = CompareOptions.data,
    options: SplitOptions | None = None,
    *,
    tokens: int = CompareOptions.data_tokens,
    tasks: str | Sequence[str] = (),
    questions: int | None = None,
    only: str | Sequence[str] = (),
    further: Mapping[str, Mapping[str, Any]] | None = None,
    out: str | Path | None = None,
    track: Track[Any] = shown,
    **choices: Any,
) -> Comparison:
    """Measure the methods at each budget.

    Args:
        model: the dense model.
        budgets: shares of the FFN parameters that a token uses.
        data: evaluation texts.
        options: calibration, number of experts, device; methods replace what is theirs.
        tokens: at most so many tokens of each text, in whole blocks.
        tasks: multiple choices that every method answers: .jsonl files, or tasks of lm-eval.
        questions: at most so many of each; None means all.
        only: names of methods; all if there are none. The reference is always there.
        further: more splits, name -> options, each with its own budget and a static control that cuts the same layers.
        out: a JSON file for the result.
        track: wraps the loop over methods.
        choices: single options by name, in place of those in `options`.

    Raises:
        UsageError: an unknown method, or no budget.
        InputError: a model or text that cannot be used, or a place that cannot be written.

    Example:
        table = moeify.compare("builtin", 0.5, only=["CMoE", "neuron oracle"])
        print({row.method: row.value for row in table.rows})
    """
    budgets, data, only, options = (
        several(budgets),
        names_of(data),
        several(only),
        SplitOptions.chosen(options, choices),
    )
    _check(budgets, data)
    if out is not None:
        out = Path(out)
        check_writable(out, Comparison)
    # Experts of any width: no kernel limits a split that is only measured.
    asked = Tasks(several(tasks), questions, track)
    base = replace(options, dtype="float32")
    dense = open_dense(model, track)
    prepared = prepare(dense, base, writable=False)
    data = suited(EvalOptions(tuple(data)), [dense.config]).data
    warn_of_kind({dense.name: prepared.options.calibration}, data)
    experts = prepared.layout.num_experts
    base = replace(base, experts=experts)
    _check_experts(experts, budgets, only)
    blocks = calibration_inputs(prepared)
    texts = {source: _evaluation(prepared, source, tokens, blocks) for source in data}
    whole = reduce(one_behind_other, texts.values())
    check_place(cache_dir() / "compare" / "losses")
    rows = _task_rows(asked, dense)
    trials = Trials(prepared, blocks.inputs, whole, rows.ids_BC)
    rows_of = Entries(prepared, trials, blocks, base)
    entries = [*rows_of.known(budgets, only), *rows_of.further(further or {})]
    ids = [tensor.numpy() for inputs in (blocks.inputs, *texts.values()) for tensor in inputs.values()]
    results = measured(entries, prepared, ids, rows, track)
    names = [entry.name if len(budgets) == 1 else f"{entry.name}, {entry.budget:.0%}" for entry in entries]
    counts = {source: num_blocks(inputs) for source, inputs in texts.items()}
    context, measure = prepared.options.context or 0, measure_of(dense.config)
    comparison = Comparison(
        prepared.dense.name,
        tuple(_rows(dict(zip(entries, results, strict=True)), budgets, counts, measure)),
        asdict(blocks.provenance),
        {"tokens": {name: count * context for name, count in counts.items()}, "context": context},
        tuple(rows.results({name: result.likelihoods for name, result in zip(names, results, strict=True)})),
        measure,
    )
    if out is not None:
        write(comparison, out)
    return comparison


def _check(budgets: Sequence[float], data: Sequence[str]) -> None:
    """Raise UsageError before anything is read."""
    if not budgets or not all(0 < budget < 1 for budget in budgets):
        raise UsageError(f"budgets {list(budgets)} are out of range", "--budget takes more than 0 and less than 1")
    if not data:
        raise UsageError("no text to evaluate on", "name one with --data")


def _check_experts(experts: int, budgets: Sequence[float], only: Sequence[str]) -> None:
    """Raise UsageError unless there are such methods, and whole numbers of experts meet the budgets."""
    known = methods(experts)
    if strange := [name for name in only if name not in known]:
        raise unknown("a method", strange[0], known)
    if missed := [budget for budget in budgets if not (budget * experts).is_integer()]:
        works = ", ".join(f"{count / experts:g}" for count in range(1, experts))
        raise UsageError(f"{missed[0]:g} of {experts} experts is not a whole number", f"--budget takes {works}")


def _task_rows(asked: Tasks, dense: DenseModel) -> TaskRows:
    """The questions of all tasks, which only language models are asked."""
    questions = asked.questions()
    if questions:
        check_language_model(dense.config, "a multiple choice")
    return TaskRows.of(questions, dense.tokenizer() if questions else None, dense.family.context_of(dense.text_config))


def _evaluation(prepared: Prepared, source: str, tokens: int, blocks: Blocks) -> Inputs:
    """The first whole blocks of a text; examples for what is no language model."""
    context, dense = prepared.options.context, prepared.dense
    assert context is not None
    if measure_of(dense.config) != PERPLEXITY:
        examples, _ = EXAMPLES[dense.family.modality](dense.path, source, tokens, context)
        inputs = reduce(one_behind_other, examples)
        if dense.family.modality != "audio":
            return inputs
        return dictated(dense, inputs, prepared.options.device, blocks.inputs["decoder_input_ids"].shape[1])
    ids_T = evaluation_tokens(source, prepared.dense.tokenizer(), num_tokens=tokens).ids_T
    blocks_BC = whole_blocks(source, ids_T, context)
    warn_of_few(source, blocks_BC.numel() - len(blocks_BC))
    return {"input_ids": blocks_BC}


def _rows(
    results: Mapping[Entry, Result], budgets: Sequence[float], counts: Mapping[str, int], measure: str
) -> Iterator[Row]:
    """The table, in the order of the entries; `counts` of blocks of each text."""
    value_of, over = (perplexity_of, perplexity_ratio) if measure == PERPLEXITY else (mean_of, mean_ratio)
    dense_B = next(iter(results.values())).losses_B
    references = {entry.budget: result.losses_B for entry, result in results.items() if entry.name == REFERENCE}
    for entry, result in results.items():
        # The budget of a search comes out near one of the table's.
        static_B = references[_nearest(budgets, entry.budget)]
        losses_B = result.losses_B
        gap = float(static_B.mean() - dense_B.mean())
        own, ratio = value_of(losses_B), over(losses_B, static_B)
        parts = losses_B.split(list(counts.values()))
        yield Row(
            method=entry.name,
            budget=entry.budget,
            value=own.value,
            low=own.low,
            high=own.high,
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            gap_closed=float(static_B.mean() - losses_B.mean()) / gap if gap else 0.0,
            texts={name: value_of(part).value for name, part in zip(counts, parts, strict=True)},
            diagnostics=result.diagnostics,
        )


def _nearest(budgets: Sequence[float], budget: float) -> float:
    return min(budgets, key=lambda other: abs(other - budget))
