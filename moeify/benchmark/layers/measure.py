"""One case of the layer benchmark: weights and inputs, every peer prepared, all of them timed in turn."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.layers.accuracy import Error, Reference, leaves_of, outputs_and_gradients, saved_bytes
from moeify.benchmark.layers.cases import Batch, Case, Layer, draw_batch, draw_layer, seed_of, touched_bytes, work
from moeify.benchmark.layers.peers import DENSE, EAGER, OURS, PEERS, Forward, Peer
from moeify.benchmark.layers.results import Row, compared
from moeify.benchmark.timing import Call, Candidate, Samples, Timer, first_line, release_memory, take_turns
from moeify.errors import MoeifyError

# Weights are cold if this many times the L2 cache was read since they were last used.
COLD_FACTOR = 4
# One launch holds calls for about so long at the floor, and no more than so many beyond what keeps weights cold.
LAUNCH_SECONDS = 1e-3
MAX_CALLS = 32
# Of the time of a row; the rest goes to single calls.
MAIN_SHARE = 2 / 3


@dataclass(frozen=True)
class _Setup:
    """One case, ready for every peer: copies of the weights and as many batches as there are calls."""

    case: Case
    timer: Timer
    ceilings: Ceilings
    layers: Sequence[Layer]
    batches: Sequence[Batch]
    eager: Error | None
    references: dict[bool, Reference] = field(default_factory=dict)

    @property
    def training(self) -> bool:
        return self.case.pass_name == "training"

    def error(self, peer: Peer) -> Error:
        """Of one call on the first batch, against a reference that is computed once."""
        layer, batch = self.layers[0], self.batches[0]
        if peer.dense not in self.references:
            self.references[peer.dense] = Reference(layer, batch, dense=peer.dense, training=self.training)
        return self.references[peer.dense].error(outputs_and_gradients(peer, layer, batch, training=self.training))


@dataclass(frozen=True)
class _Ready:
    """A peer that ran a case and can be timed on it."""

    candidate: Candidate
    single: Call
    first_use_seconds: float
    error: Error
    peak_memory_bytes: int | None
    saved_bytes: int | None


class DeviceError(MoeifyError):
    """The device can do nothing more in this process."""


def measure(
    case: Case, peers: Sequence[Peer], timer: Timer, ceilings: Ceilings, dtype: torch.dtype, *, seconds: float
) -> list[Row]:
    """One row a peer, in the order of the peers; one that cannot run the case says why.

    Args:
        seconds: how long each peer is timed; preparing it comes on top.

    Raises:
        DeviceError: a peer has left the device unusable.
    """
    setup = _set_up(case, timer, ceilings, dtype, routes=any(not peer.dense for peer in peers))
    ready: dict[str, _Ready] = {}
    failed: dict[str, str] = {}
    for peer in peers:
        try:
            ready[peer.name] = _prepare(setup, peer)
        except Exception as error:
            failed[peer.name] = first_line(error)
        if peer.name in failed:
            # Outside of the handler, where the error no longer holds what the peer had allocated.
            _check_device(timer, peer, case, failed[peer.name])
            release_memory()
    main = take_turns(
        {name: partial(timer.sample, found.candidate) for name, found in ready.items()}, seconds=seconds * MAIN_SHARE
    )
    singles = take_turns(
        {name: partial(timer.single, found.single) for name, found in ready.items()}, seconds=seconds * (1 - MAIN_SHARE)
    )
    rows = []
    for peer in peers:
        row = _row(setup, peer)
        if peer.name in failed:
            rows.append(replace(row, status="failed", reason=failed[peer.name]))
        else:
            rows.append(_timed(row, setup, ready[peer.name], main[peer.name], singles[peer.name]))
    return compared(rows, ours=OURS, dense=DENSE)


def _set_up(case: Case, timer: Timer, ceilings: Ceilings, dtype: torch.dtype, *, routes: bool) -> _Setup:
    """Weights and inputs: enough copies that none is still in the cache when its turn comes again."""
    generator = torch.Generator(timer.device).manual_seed(seed_of(case))
    host = torch.Generator().manual_seed(seed_of(case))
    batch = draw_batch(case, dtype, generator, host)
    hit = batch.num_experts_hit
    copies = max(1, math.ceil(COLD_FACTOR * timer.cache_bytes / touched_bytes(case, hit, dtype.itemsize)))
    floor = work(case, hit, ceilings, element_bytes=dtype.itemsize).seconds
    wanted = min(MAX_CALLS, math.ceil(LAUNCH_SECONDS / floor))
    num_calls = copies * math.ceil(wanted / copies)
    layers = [draw_layer(case.shape, dtype, generator) for _ in range(copies)]
    batches = [batch, *(draw_batch(case, dtype, generator, host) for _ in range(num_calls - 1))]
    setup = _Setup(case, timer, ceilings, layers, batches, None)
    # What eager's error is belongs beside every other's, whether eager is measured or not.
    return replace(setup, eager=setup.error(PEERS[EAGER])) if routes else setup


def _prepare(setup: _Setup, peer: Peer) -> _Ready:
    """Everything about a peer that is not a sample of its time. Raises whatever the peer raises."""
    timer = setup.timer
    began = time.perf_counter()
    forwards = [peer.build(layer) for layer in setup.layers]
    calls = [
        _call(setup, peer, forwards[index % len(forwards)], index % len(forwards), batch)
        for index, batch in enumerate(setup.batches)
    ]
    calls[0]()
    timer.wait()
    first_use_seconds = time.perf_counter() - began
    error = setup.error(peer)
    saved = None
    if setup.training:
        leaves_of(peer, setup.batches[0])
        saved = saved_bytes(lambda: forwards[0](setup.batches[0]), peer.parameters(setup.layers[0]))
    peak = timer.peak_bytes(calls[0])
    # Other routings may make other sizes, which libraries prepare for at first sight.
    for call in calls[1:]:
        call()
    timer.wait()
    return _Ready(timer.candidate(calls), calls[0], first_use_seconds, error, peak, saved)


def _call(setup: _Setup, peer: Peer, forward: Forward, copy: int, batch: Batch) -> Call:
    """One call as it is timed: forward alone without autograd, or forward and all gradients."""
    if not setup.training:

        def run() -> Tensor:
            with torch.no_grad():
                return forward(batch)

        return run
    wanted = [*leaves_of(peer, batch), *peer.parameters(setup.layers[copy])]
    return lambda: torch.autograd.grad(forward(batch), wanted, batch.output_gradient_TD)


def _row(setup: _Setup, peer: Peer) -> Row:
    """What is known of a row before anything has run: the case and its floor."""
    case, shape = setup.case, setup.case.shape
    experts_hit = statistics.mean(batch.num_experts_hit for batch in setup.batches)
    element_bytes = setup.layers[0].up_EPD.element_size()
    floor = work(case, experts_hit, setup.ceilings, element_bytes=element_bytes, dense=peer.dense)
    return Row(
        case=case.name,
        shape=shape.name,
        tokens=case.tokens,
        routing=case.routing,
        pass_name=case.pass_name,
        hidden=shape.hidden,
        width=shape.width,
        slices=shape.slices,
        shared=shape.shared,
        active=shape.active,
        peer=peer.name,
        experts_hit=None if peer.dense else experts_hit,
        floor_us=floor.seconds * 1e6,
        floor_bytes=floor.num_bytes,
        flops=floor.flops,
        eager_error=setup.eager.output if setup.eager and not peer.dense else None,
        eager_gradient_error=setup.eager.gradients if setup.eager and not peer.dense else None,
    )


def _timed(row: Row, setup: _Setup, ready: _Ready, main: Samples, single: Samples) -> Row:
    """Fill in what was measured."""
    assert row.floor_us is not None
    assert row.floor_bytes is not None
    assert row.flops is not None
    failure = main.failure or single.failure
    if failure is not None:
        return replace(row, status="failed", reason=first_line(failure))
    wrong = ready.error.is_wrong(None if row.eager_error is None else setup.eager)
    seconds = main.median
    return replace(
        row,
        status="wrong" if wrong else "ok",
        reason="its error is no rounding" if wrong else "",
        us=seconds * 1e6,
        us_low=main.quantile(0.1) * 1e6,
        us_high=main.quantile(0.9) * 1e6,
        num_samples=len(main.seconds),
        num_calls=ready.candidate.num_calls,
        method=ready.candidate.method,
        method_reason=ready.candidate.reason,
        launch_us=single.median * 1e6,
        first_use_seconds=ready.first_use_seconds,
        time_over_floor=seconds * 1e6 / row.floor_us,
        tflops_per_second=row.flops / seconds / 1e12,
        gb_per_second=row.floor_bytes / seconds / 1e9,
        peak_memory_bytes=ready.peak_memory_bytes,
        saved_bytes_per_token=None if ready.saved_bytes is None else ready.saved_bytes / row.tokens,
        error=_finite(ready.error.output),
        gradient_error=_finite(ready.error.gradients),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _check_device(timer: Timer, peer: Peer, case: Case, reason: str) -> None:
    """After an error: some, an illegal access for one, leave a device that does nothing more.

    Raises:
        DeviceError: it does not.
    """
    try:
        timer.wait()
    except RuntimeError as error:
        raise DeviceError(
            f"{peer.name} broke the device on {case.name}: {reason}", f"leave {peer.name} out with --peers"
        ) from error
