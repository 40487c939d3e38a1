"""Methods side by side: every one on the same calibration tokens, the same evaluation text, in one run.

Losses of finished methods are kept, so that a run that was stopped goes on.

Legend: T tokens, B blocks of C tokens, L = C - 1 losses a block, S resamples.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.check.baselines import NeuronOracle, fit_bias_compensated
from moeify.check.bootstrap import draws, interval
from moeify.check.trials import Control, Trial, Trials
from moeify.convert.prepare import Prepared, calibration_text, prepare
from moeify.data.text import evaluation_tokens
from moeify.errors import InputError, UsageError
from moeify.models.dense import DenseModel, open_dense
from moeify.options import SplitOptions, Track, untracked
from moeify.results import write
from moeify.version import __version__

DENSE = "dense"
REFERENCE = "static + refit"


@dataclass(frozen=True)
class Method:
    """One row of the table: a split's options, or a control that no split can write.

    Args:
        options: of the split, beside budget and calibration.
        control: `oracle` or `bias`, instead of a split.
        num_shared: given the number of active experts; None leaves it to the layout.
    """

    options: Mapping[str, Any]
    control: str = ""
    num_shared: Callable[[int], int] | None = None


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Args:
        method: its name.
        budget: share of the FFN parameters that a token uses; one for the dense model.
        perplexity, low, high: over all evaluation tokens, with its confidence interval (bootstrap over blocks).
        ratio, ratio_low, ratio_high: to static pruning with refit at the same budget; the same blocks are drawn for
            both.
        gap_closed: share of the distance in log-perplexity from static + refit to dense.
        texts: perplexity on each text.
        diagnostics: means over the cut layers of what the fits measured.
    """

    method: str
    budget: float
    perplexity: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    gap_closed: float
    texts: Mapping[str, float]
    diagnostics: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The whole table and what it was measured on."""

    model: str
    rows: tuple[Row, ...]
    calibration: Mapping[str, Any]
    evaluation: Mapping[str, Any]


def methods(experts: int) -> dict[str, Method]:
    """What is compared, by name; published methods with their own parts only.

    Peers get hard unit weights, without which they collapse untrained, and no refit. Where they train a router, theirs
    is fitted to the calibration tokens (MoEfication's MLP) or has the experts' centroids for rows (LLaMA-MoE). CMoE
    shares half of the active experts, LLaMA-MoE v2 one.
    """

    def half(active: int) -> int:
        return active // 2

    def one(active: int) -> int:
        # Of a single active expert nothing would be routed.
        return min(1, active - 1)

    # The refit's options do not concern them, so that they need not be measured again when those change.
    peer = {"refit": False, "refit_to": "ffn"}
    return {
        "neuron oracle": Method({}, control="oracle"),
        "static": Method({"static": True, **peer}),
        REFERENCE: Method({"static": True}),
        "static + bias (FLAP)": Method({}, control="bias"),
        "random": Method({"partition": "random", "router": "ridge", **peer}, num_shared=half),
        "LLaMA-MoE": Method({"partition": "random", "router": "centroid", **peer}, num_shared=lambda _: 0),
        "LLaMA-MoE v2": Method({"partition": "gradient", "router": "centroid", **peer}, num_shared=one),
        "MoEfication": Method({"partition": "kmeans", "router": "mlp", **peer}, num_shared=lambda _: 0),
        "CMoE": Method({"partition": "marker", "router": "representative", **peer}, num_shared=half),
        "energy clusters + refit": Method({"partition": "energy"}, num_shared=half),
        **{f"moeify, {count} experts": Method({"experts": count}) for count in sorted({experts, 8, 32, 128})},
    }


def compare(
    model: str,
    budgets: Sequence[float],
    data: Sequence[str],
    options: SplitOptions | None = None,
    *,
    tokens: int = 10_240,
    only: Sequence[str] = (),
    further: Mapping[str, Mapping[str, Any]] | None = None,
    out: Path | None = None,
    track: Track[Any] = untracked,
) -> Comparison:
    """Measure the methods at each budget.

    Args:
        model: the dense model.
        budgets: shares of the FFN parameters that a token uses.
        data: evaluation texts.
        options: calibration, number of experts, device; methods replace what is theirs.
        tokens: at most so many tokens of each text, in whole blocks.
        only: names of methods; all if there are none. The reference is always there.
        further: more splits, name -> options, each with its own budget and a static control that cuts the same layers.
        out: a JSON file for the result; the losses of finished methods are kept beside it for this and further runs.
        track: wraps the loop over methods.

    Raises:
        UsageError: an unknown method, or no budget.
        InputError: a model or text that cannot be used.
    """
    options = options or SplitOptions()
    known = methods(options.experts)
    _check(options, budgets, data, [name for name in only if name not in known], list(known))
    # Experts of any width: no kernel limits what is only measured.
    base = replace(options, dtype="float32")
    dense = open_dense(model, track)
    prepared = prepare(dense, base, writable=False)
    blocks = calibration_text(prepared)
    texts = {source: _blocks(prepared, source, tokens) for source in data}
    trials = Trials(prepared, blocks.ids_BC, torch.cat(list(texts.values())))
    num_neurons = dense.num_neurons
    wanted = [
        (name, budget, method)
        for budget in budgets
        for name, method in known.items()
        if (name in {*only, REFERENCE} if only else _exists(method, budget, num_neurons))
    ]
    runs = [_run(dense, trials, base, asked) for asked in [(DENSE, 1.0, Method({}, control=DENSE)), *wanted]]
    runs += [_further(dense, trials, base, *row) for row in _with_static(further or {})]
    kept = _Kept(out, prepared.dense.fingerprint(), [blocks.ids_BC, *texts.values()])
    for run in track(runs, "comparing methods", len(runs)):
        kept.measure(run)
    comparison = Comparison(
        prepared.dense.name,
        tuple(_rows(runs, kept, budgets, {name: len(ids_BC) for name, ids_BC in texts.items()})),
        asdict(blocks.provenance),
        {"tokens": {name: ids_BC.numel() for name, ids_BC in texts.items()}, "context": prepared.options.context},
    )
    if out is not None:
        write(comparison, out)
    return comparison


def _check(
    options: SplitOptions, budgets: Sequence[float], data: Sequence[str], unknown: Sequence[str], known: Sequence[str]
) -> None:
    """Raise UsageError before anything is read."""
    if unknown:
        raise UsageError(f"no method named {unknown[0]!r}", f"one of: {', '.join(known)}")
    if not budgets or not all(0 < budget < 1 for budget in budgets):
        raise UsageError(f"budgets {list(budgets)} are out of range", "--budget takes more than 0 and less than 1")
    if not data:
        raise UsageError("no text to evaluate on", "name one with --data")
    if missed := [budget for budget in budgets if not (budget * options.experts).is_integer()]:
        works = ", ".join(f"{count / options.experts:g}" for count in range(1, options.experts))
        raise UsageError(f"{missed[0]:g} of {options.experts} experts is no whole number", f"--budget takes {works}")


@dataclass(frozen=True)
class _Run:
    """One row to be: what it is called, all that its losses depend on beside the tokens, and how to get them."""

    name: str
    budget: float
    how: Any
    measure: Callable[[], Trial]

    @property
    def label(self) -> str:
        return f"{self.name} @ {self.budget:.4f}"


def _run(dense: DenseModel, trials: Trials, base: SplitOptions, asked: tuple[str, float, Method]) -> _Run:
    """A method at a budget."""
    name, budget, method = asked
    if method.control:
        return _Run(name, budget, method.control, partial(trials.control, CONTROLS[method.control](budget)))
    variant = prepare(dense, _at(budget, base, method), writable=False)
    return _Run(name, budget, asdict(variant.options), partial(trials.split, variant))


def _at(budget: float, base: SplitOptions, method: Method) -> SplitOptions:
    """The method's split options at a budget."""
    active = max(1, round(budget * int(method.options.get("experts", base.experts))))
    shared = method.num_shared(active) if method.num_shared else None
    return replace(base, **{**method.options, "active": active, "shared": shared})


def _further(dense: DenseModel, trials: Trials, base: SplitOptions, name: str, changes: Mapping[str, Any]) -> _Run:
    """A split with a budget of its own."""
    variant = prepare(dense, replace(base, **changes), writable=False)
    share = variant.layout.model_share(variant.dense.num_layers)
    return _Run(name, share, asdict(variant.options), partial(trials.split, variant))


CONTROLS: dict[str, Callable[[float], Control]] = {
    DENSE: lambda _: lambda ffn, _inputs_TD: ffn,
    "oracle": lambda budget: lambda ffn, _inputs_TD: NeuronOracle(ffn, budget),
    "bias": lambda budget: lambda ffn, inputs_TD: fit_bias_compensated(ffn, inputs_TD, budget),
}


def _exists(method: Method, budget: float, num_neurons: int) -> bool:
    """False if its number of experts does not cut these FFNs, or cannot meet the budget."""
    experts = int(method.options.get("experts", 1))
    return num_neurons % experts == 0 and (experts == 1 or (budget * experts).is_integer())


def _with_static(further: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each further split, and static pruning with refit in the very layers that it cuts."""
    for name, changes in further.items():
        yield name, changes
        yield f"{REFERENCE}, layers of {name}", {**changes, "static": True, "shared": None}


def _blocks(prepared: Prepared, source: str, tokens: int) -> Tensor:
    """The first whole blocks of a text."""
    context = prepared.options.context
    assert context is not None
    ids_T = evaluation_tokens(source, prepared.dense.tokenizer(), num_tokens=tokens).ids_T
    if len(ids_T) < context:
        raise InputError(f"{source} has {len(ids_T)} tokens, less than a block of {context}", "name a longer text")
    return ids_T[: len(ids_T) // context * context].view(-1, context)


class _Kept:
    """Mean losses of blocks for finished runs, in memory and beside the result file."""

    def __init__(self, out: Path | None, fingerprint: Any, ids: Sequence[Tensor]) -> None:
        self._file = out.with_name(f"{out.name}.partial") if out else None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps([fingerprint, __version__], sort_keys=True).encode())
        for ids_BC in ids:
            digest.update(ids_BC.numpy().astype("<i8").tobytes())
        self._key = digest.hexdigest()
        stored = json.loads(self._file.read_text()) if self._file and self._file.is_file() else {}
        self._runs: dict[str, Any] = stored.get(self._key, {})

    def measure(self, run: _Run) -> None:
        """Measure what has not been measured in this very way."""
        how = json.loads(json.dumps(run.how))
        if self._runs.get(run.label, {}).get("how") == how:
            return
        trial = run.measure()
        losses = trial.losses_BL.double().mean(dim=1).tolist()
        self._runs[run.label] = {"how": how, "losses": losses, "diagnostics": dict(trial.diagnostics)}
        if self._file is not None:
            temporary = self._file.with_name(f"{self._file.name}.new")
            temporary.write_text(json.dumps({self._key: self._runs}))
            temporary.replace(self._file)

    def losses(self, label: str) -> Tensor:
        """loss_B, float64."""
        return torch.tensor(self._runs[label]["losses"], dtype=torch.float64)

    def diagnostics(self, label: str) -> Mapping[str, float]:
        found: Mapping[str, float] = self._runs[label]["diagnostics"]
        return found


def _rows(runs: Sequence[_Run], kept: _Kept, budgets: Sequence[float], texts: Mapping[str, int]) -> Iterator[Row]:
    """The table, in the order of the runs."""
    dense_B = kept.losses(runs[0].label)
    references = {run.budget: kept.losses(run.label) for run in runs if run.name == REFERENCE}
    draws_SB = draws(len(dense_B))
    for run in runs:
        # A searched budget comes out near the one that was asked for.
        static_B = references[min(budgets, key=lambda asked: abs(asked - run.budget))]
        found_B = kept.losses(run.label)
        gap = float(static_B.mean() - dense_B.mean())
        low, high = _factors(found_B[draws_SB].mean(dim=1))
        ratio_low, ratio_high = _factors((found_B - static_B)[draws_SB].mean(dim=1))
        parts = found_B.split(list(texts.values()))
        yield Row(
            method=run.name,
            budget=run.budget,
            perplexity=float(found_B.mean().exp()),
            low=low,
            high=high,
            ratio=float((found_B - static_B).mean().exp()),
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            gap_closed=float(static_B.mean() - found_B.mean()) / gap if gap else 0.0,
            texts={name: float(part.mean().exp()) for name, part in zip(texts, parts, strict=True)},
            diagnostics=kept.diagnostics(run.label),
        )


def _factors(logs_S: Tensor) -> tuple[float, float]:
    """The interval of resampled logarithms, as factors."""
    low, high = interval(logs_S)
    return math.exp(low), math.exp(high)
