"""Timers for CUDA devices and the CPU: many calls in one launch, several candidates in turn.

On a CUDA device a candidate is a number of calls held in one CUDA graph, so that launching costs next to nothing; calls
that cannot be captured are launched one after another instead, and the reason is kept. Before every sample the L2 cache
is overwritten, which also gives the host time to be ahead of the device.

Importing this needs torch alone.
"""

import gc
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch

Call = Callable[[], object]
Method = Literal["graph", "stream", "loop"]

# What overwrites the L2 cache is this many times larger.
FLUSH_FACTOR = 8
# Samples a candidate gives at least, and at most.
MIN_SAMPLES = 3
MAX_SAMPLES = 100


@dataclass(frozen=True)
class Candidate:
    """Calls that are timed together.

    Args:
        launch: runs all of them.
        num_calls: how many.
        method: one CUDA graph; one after another on a CUDA stream; a loop on the CPU.
        reason: why it is no graph; empty if it is one or if there are none on this device.
    """

    launch: Call
    num_calls: int
    method: Method
    reason: str = ""


@dataclass
class Samples:
    """Seconds a call of one candidate, and why it stopped early if it did."""

    seconds: list[float] = field(default_factory=list)
    failure: Exception | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Nearest rank."""
        return sorted(self.seconds)[round(share * (len(self.seconds) - 1))]


class Timer(ABC):
    """How calls are run and timed on one device."""

    device: torch.device
    # Zero where nothing is done about caches.
    cache_bytes: int = 0

    @abstractmethod
    def wait(self) -> None:
        """Until the device has done everything."""

    @abstractmethod
    def candidate(self, calls: Sequence[Call]) -> Candidate:
        """Prepare calls, which have run before, to be timed together."""

    @abstractmethod
    def sample(self, candidate: Candidate) -> float:
        """Seconds a call, of all calls launched once with a cold cache."""

    @abstractmethod
    def single(self, call: Call) -> float:
        """Seconds from an idle device with a cold cache to the end of one call: what eager code pays."""

    @abstractmethod
    def peak_bytes(self, call: Call) -> int | None:
        """Memory that one call takes above what is there already, its results included; None if not known."""

    @abstractmethod
    def consecutive(self, call: Call, repeats: int) -> list[float]:
        """Seconds of each of several calls that follow one another without a gap."""

    def first(self, call: Call) -> float:
        """Seconds of one call by the host's clock: what the first use costs, compilation included."""
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - began


class CpuTimer(Timer):
    """The host's clock around calls. Caches stay as they are."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def wait(self) -> None:
        pass

    def candidate(self, calls: Sequence[Call]) -> Candidate:
        return Candidate(partial(_run_all, calls), len(calls), "loop")

    def sample(self, candidate: Candidate) -> float:
        return self.first(candidate.launch) / candidate.num_calls

    def single(self, call: Call) -> float:
        return self.first(call)

    def peak_bytes(self, call: Call) -> int | None:  # noqa: ARG002
        return None

    def consecutive(self, call: Call, repeats: int) -> list[float]:
        return [self.first(call) for _ in range(repeats)]


class CudaTimer(Timer):
    """Events on a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(FLUSH_FACTOR * self.cache_bytes, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def candidate(self, calls: Sequence[Call]) -> Candidate:
        try:
            graph = self._capture(calls)
        except Exception as error:
            # A capture that failed half-way may have left work behind.
            self.wait()
            return Candidate(partial(_run_all, calls), len(calls), "stream", first_line(error))
        return Candidate(graph.replay, len(calls), "graph")

    def _capture(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        """Record the calls into one graph.

        Raises:
            RuntimeError: a call waits for the device or does something else that no graph can hold.
        """
        # Waiting inside a capture breaks it and can take the allocator along; outside it is a plain error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _run_all(calls[:2])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _run_all(calls)
        graph.replay()
        self.wait()
        return graph

    def sample(self, candidate: Candidate) -> float:
        began, ended = _event(), _event()
        self._flushed.zero_()
        began.record()
        candidate.launch()
        ended.record()
        self.wait()
        return float(began.elapsed_time(ended)) / 1e3 / candidate.num_calls

    def single(self, call: Call) -> float:
        began, ended = _event(), _event()
        self._flushed.zero_()
        self.wait()
        began.record()
        call()
        ended.record()
        self.wait()
        return float(began.elapsed_time(ended)) / 1e3

    def peak_bytes(self, call: Call) -> int | None:
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = call()
        self.wait()
        del result
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def consecutive(self, call: Call, repeats: int) -> list[float]:
        events = [_event() for _ in range(repeats + 1)]
        self._flushed.zero_()
        for event in events[:-1]:
            event.record()
            call()
        events[-1].record()
        self.wait()
        return [began.elapsed_time(ended) / 1e3 for began, ended in pairwise(events)]


def timer_for(device: torch.device) -> Timer:
    """The timer of a device: CUDA or CPU."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def take_turns(measure: Mapping[str, Callable[[], float]], *, seconds: float) -> dict[str, Samples]:
    """Sample several candidates in turn, so that a drift of the machine hits all alike.

    Every candidate has the same share of the time: a slow one gives fewer samples, but MIN_SAMPLES at least. Each round
    begins with another one. One that raises an error keeps the error and leaves.

    Args:
        measure: takes one sample, in seconds a call.
        seconds: wall-clock time of each candidate.
    """
    found = {name: Samples() for name in measure}
    left = dict.fromkeys(measure, seconds)
    waiting = list(measure)
    while waiting:
        for name in tuple(waiting):
            samples = found[name]
            began = time.perf_counter()
            try:
                samples.seconds.append(measure[name]())
            except Exception as error:
                samples.failure = error.with_traceback(None)
            left[name] -= time.perf_counter() - began
            enough = left[name] <= 0 and len(samples.seconds) >= MIN_SAMPLES
            if enough or samples.failure or len(samples.seconds) >= MAX_SAMPLES:
                waiting.remove(name)
        waiting = waiting[1:] + waiting[:1]
    return found


def release_memory() -> None:
    """Give freed device memory back, so that the next candidate finds all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:200]


def _run_all(calls: Sequence[Call]) -> None:
    """Results are dropped at once: all of them together may not fit."""
    for call in calls:
        call()


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)
