"""The rows of a comparison before they are measured: what each is of, and where its losses are kept.

Legend: T tokens, B blocks of C tokens, L losses a block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify import partition
from moeify.cache import cache_dir, digest, once
from moeify.check.baselines import NeuronOracle, fit_bias_compensated
from moeify.check.depth_trials import DepthTrial
from moeify.check.methods import REFERENCE, Method, methods
from moeify.check.tasks_rows import TaskRows
from moeify.check.trials import Control, Trial, Trials
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.search_scores import Absent
from moeify.convert.texts import Blocks
from moeify.errors import kept_when_interrupted
from moeify.models.dense import DenseModel
from moeify.models.heads import LANGUAGE_MODELS, auto_name
from moeify.options import SplitOptions, Track
from moeify.progress import Resumed

DENSE = "dense"


@dataclass(frozen=True, eq=False)
class Entry:
    """A row before it is measured.

    Args:
        name, budget: as in the row.
        inputs: all that its losses depend on beside model and tokens.
        measure: tries it.
    """

    name: str
    budget: float
    inputs: Any
    measure: Callable[[], Trial]

    def file(self, prepared: Prepared, ids: Sequence[Any], rows: TaskRows) -> Path:
        """Where the losses stay."""
        asked = [] if rows.ids_BC is None else [rows.ids_BC.numpy(), rows.spans]
        return cache_dir() / "compare" / f"{digest(prepared.dense.fingerprint(), self.inputs, *ids, *asked)}.json"

    def result(self, prepared: Prepared, ids: Sequence[Any], rows: TaskRows) -> "Result":
        """Measured, unless an earlier run measured the same."""

        def measure() -> dict[str, Any]:
            trial = self.measure()
            prepared.dense.check_unchanged()
            losses = trial.losses_BL.double().mean(dim=1).tolist()
            choices = [] if trial.aside_BL is None else rows.likelihoods(trial.aside_BL)
            return {"losses": losses, "diagnostics": dict(trial.diagnostics), "choices": choices}

        values = once(self.file(prepared, ids, rows), measure)
        losses_B = torch.tensor(values["losses"], dtype=torch.float64)
        return Result(losses_B, values["diagnostics"], values["choices"])


@dataclass(frozen=True)
class Result:
    """Mean losses of the evaluation blocks, float64, means of the fits' diagnostics, and likelihoods of the choices."""

    losses_B: Tensor
    diagnostics: Mapping[str, float]
    likelihoods: Sequence[float]


def measured(
    entries: Sequence[Entry], prepared: Prepared, ids: Sequence[Any], rows: TaskRows, track: Track[Any]
) -> list[Result]:
    """What every entry gives; those that an earlier run measured are not measured again.

    Args:
        entries: in the order of the table.
        prepared: the model.
        ids: all that is read.
        rows: of tasks.
        track: wraps the loop.
    """
    known = takewhile(lambda entry: entry.file(prepared, ids, rows).is_file(), entries)
    waiting = Resumed(entries, sum(1 for _ in known))
    with kept_when_interrupted("the methods that are measured"):
        return [entry.result(prepared, ids, rows) for entry in track(waiting, "comparing methods", len(entries))]


@dataclass(frozen=True, eq=False)
class Entries:
    """Makes the rows of one comparison.

    Args:
        prepared: the model.
        trials: measure them.
        blocks: what splits are calibrated on.
        base: options that all splits share.
    """

    prepared: Prepared
    trials: Trials
    blocks: Blocks
    base: SplitOptions

    def known(self, budgets: Sequence[float], only: Sequence[str]) -> Iterator[Entry]:
        """Dense, then the methods at each budget."""
        assert self.base.experts is not None
        yield self._control(DENSE, 1.0, DENSE)
        for budget in budgets:
            for name, method in methods(self.base.experts).items():
                if name not in {*only, REFERENCE} if only else not _exists(method, budget, self.prepared.dense):
                    continue
                if method.control:
                    yield self._control(name, budget, method.control)
                elif method.absent:
                    yield self._by_depth(name, budget, method.absent)
                else:
                    yield self._split(name, options_at(budget, self.base, method), budget)

    def further(self, splits: Mapping[str, Mapping[str, Any]]) -> Iterator[Entry]:
        """Each further split, and static pruning with refit in the very layers that it cuts."""
        for name, changes in splits.items():
            yield self._split(name, replace(self.base, **changes))
            static = {**changes, "static": True, "shared": None}
            yield self._split(f"{REFERENCE}, layers of {name}", replace(self.base, **static))

    def _control(self, name: str, budget: float, kind: str) -> Entry:
        return Entry(name, budget, [kind, budget], partial(self.trials.control, CONTROLS[kind](budget)))

    def _split(self, name: str, options: SplitOptions, budget: float | None = None) -> Entry:
        """A split; its budget follows from its options if none is given."""
        dense = self.prepared.dense
        prepared = prepare(dense, options, writable=False)
        share = prepared.layout.model_share(prepared.dense.num_layers, len(prepared.dense.dropped))
        inputs, measure = asdict(prepared.options), partial(self.trials.split, prepared)
        return Entry(name, share if budget is None else budget, inputs, measure)

    def _by_depth(self, name: str, budget: float, absent: Absent) -> Entry:
        trial = DepthTrial(self.prepared, self.blocks, self.base, absent, budget)
        inputs = ["without", absent.value, budget, asdict(self.base)]
        return Entry(name, budget, inputs, partial(trial.measure, self.trials))


def options_at(budget: float, base: SplitOptions, method: Method) -> SplitOptions:
    """The method's split options at a budget."""
    active = max(1, round(budget * int(method.options.get("experts", base.experts))))
    shared = method.num_shared(active) if method.num_shared else None
    return replace(base, **{**method.options, "active": active, "shared": shared})


CONTROLS: dict[str, Callable[[float], Control]] = {
    DENSE: lambda _: lambda ffn, _inputs_TD: ffn,
    "oracle": lambda budget: lambda ffn, _inputs_TD: NeuronOracle(ffn, budget),
    "bias": lambda budget: lambda ffn, inputs_TD: fit_bias_compensated(ffn, inputs_TD, budget),
}


def _exists(method: Method, budget: float, dense: DenseModel) -> bool:
    """False if it is not for such a model, or its number of experts does not cut these FFNs or meet the budget."""
    if dense.family.is_pair and method.absent is Absent.LAYER:
        return False
    needs_loss = partition.needs_gradients(method.options.get("partition", SplitOptions.partition))
    if needs_loss and auto_name(dense.config) not in LANGUAGE_MODELS:
        return False
    experts, num_neurons = int(method.options.get("experts", 1)), dense.num_neurons
    return num_neurons % experts == 0 and (experts == 1 or (budget * experts).is_integer())
