"""What a layer benchmark found: one row a case and peer, saved after every case so that a killed run keeps its rows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.timing import Method
from moeify.readable import Readable

Status = Literal["ok", "wrong", "failed"]


@dataclass(frozen=True)
class Row:
    """One peer on one case. What could not be measured is None, and `reason` or `method_reason` says why.

    Args:
        case: its name; shape, tokens, routing and pass_name are its parts.
        hidden, width, slices, shared, active: the shape's numbers, see moeify.benchmark.cases.Shape.
        peer: its name.
        status: `wrong` if its result is further from float64 than rounding explains, `failed` if there is none.
        us: median time of a call in microseconds, cold weights; us_low and us_high are the 10 % and 90 % quantiles.
        num_samples: each sample is the mean of num_calls calls.
        method: how the calls of a sample were launched; method_reason says why not as one graph.
        launch_us: median time of a single call from an idle device with a cold cache.
        first_use_seconds: the first call on this case, with whatever is compiled then.
        experts_hit: routed experts that at least one token chose, mean over the calls.
        floor_us: no version runs faster; floor_bytes and flops are what it is made of.
        tflops_per_second: the active experts' operations over `us`.
        gb_per_second: floor_bytes over `us`.
        peak_memory_bytes: a call's memory above weights and inputs, results included.
        saved_bytes_per_token: what autograd keeps for backward, weights left out.
        error, gradient_error: against float64, see moeify.benchmark.accuracy.Error; eager_: of transformers' eager.
        time_over_dense: us over the dense FFN's us.
        beaten_by, launch_beaten_by: for ours alone, the peers that are as fast or faster in us and launch_us.
    """

    case: str
    shape: str
    tokens: int
    routing: str
    pass_name: str
    hidden: int
    width: int
    slices: int
    shared: int
    active: int
    peer: str
    status: Status = "ok"
    reason: str = ""
    us: float | None = None
    us_low: float | None = None
    us_high: float | None = None
    num_samples: int = 0
    num_calls: int = 0
    method: Method | None = None
    method_reason: str = ""
    launch_us: float | None = None
    first_use_seconds: float | None = None
    experts_hit: float | None = None
    floor_us: float | None = None
    floor_bytes: float | None = None
    flops: float | None = None
    time_over_floor: float | None = None
    time_over_dense: float | None = None
    tflops_per_second: float | None = None
    gb_per_second: float | None = None
    peak_memory_bytes: int | None = None
    saved_bytes_per_token: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    eager_error: float | None = None
    eager_gradient_error: float | None = None
    beaten_by: tuple[str, ...] | None = None
    launch_beaten_by: tuple[str, ...] | None = None


@dataclass(repr=False)
class LayerBench(Readable):
    """A run.

    Args:
        machine: device, driver and their properties.
        versions: of the packages that the peers come from; None if not installed.
        date: when it began, UTC.
        command: that gives it again.
        dtype: of weights and tokens.
        ceilings: of this machine in this run.
        rows: in the order they were measured.
        not_run: cases that there was no time for.
        stopped: why it ended early; empty if it did not.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    date: str
    command: str
    dtype: str
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    stopped: str = ""


def compared(rows: Sequence[Row], *, ours: str, dense: str) -> list[Row]:
    """The rows of one case with what takes the others to say: time over dense, and who is ahead of ours."""
    times = {row.peer: row for row in rows if row.status == "ok"}
    dense_us = times[dense].us if dense in times else None
    complete = []
    for row in rows:
        changes: dict[str, Any] = {}
        if row.us is not None and dense_us:
            changes["time_over_dense"] = row.us / dense_us
        if row.peer == ours:
            changes["beaten_by"] = _ahead(row, times, "us")
            changes["launch_beaten_by"] = _ahead(row, times, "launch_us")
        complete.append(dataclasses.replace(row, **changes))
    return complete


def _ahead(row: Row, times: Mapping[str, Row], column: str) -> tuple[str, ...]:
    """Who ran where ours did not, or took no longer."""
    own = getattr(row, column)
    own = math.inf if own is None or row.status != "ok" else own
    others = {name: getattr(other, column) for name, other in times.items() if name != row.peer}
    return tuple(name for name, time in others.items() if time is not None and time <= own)
