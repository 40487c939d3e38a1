"""Speed of several models in one process, on real text or images, with every experts implementation that runs.

Language models are timed on prefill and decode, encoders on one pass over a batch of examples.

All models and implementations take turns on one regime, so that a drift of the machine hits them alike, and a ratio to
the dense model is taken between passes that followed one another. Decode adds one token of the text to a cache that a
real prompt has filled; afterwards the cache is as it was, so that every sample has the same length.

Traps: `time_over_dense` of a model that is much slower comes from the few rounds that it had time for. What
transformers does around the layers is in the times of all models, which hides differences of small ones.

Legend: B sequences, P tokens of a prompt or positions of an example.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.models.contenders import Contender, refusal
from moeify.benchmark.models.results import Phase, Speed
from moeify.benchmark.models.routing import ExpertsHit, watching
from moeify.benchmark.models.sizes import pass_work
from moeify.benchmark.timing import Samples, Timer, first_line, release_memory, take_turns
from moeify.check.bootstrap import draws, interval
from moeify.check.features import on_device
from moeify.models.inputs import Inputs
from moeify.options import Track, untracked

# An implementation is left out if a pass of it takes so many times the seconds of a row, so long, and so many times as
# long as with the model's fastest one; at more tokens it is not tried again.
SLOW_FACTOR = 5.0
SLOWEST_SECONDS = 3.0
BEHIND_FACTOR = 2.0

# Phases of a language model, and of any other.
WRITING: tuple[Phase, ...] = ("prefill", "decode")
READING: tuple[Phase, ...] = ("forward",)


@dataclass
class _Pass:
    """A contender's passes of one phase and what is known of them."""

    call: Callable[[], Any]
    num_tokens: int = 0
    distinct_tokens: int = 0
    cache: Any = None
    seconds: float = 0.0
    experts_hit: float | None = None
    reason: str = ""
    samples: Samples = field(default_factory=Samples)


@dataclass(frozen=True)
class _Case:
    """A phase of a regime, (batch, positions), and its inputs."""

    phase: Phase
    regime: tuple[int, int]
    inputs: Inputs


@torch.no_grad()
def measure_speed(
    contenders: Sequence[Contender],
    cases: Mapping[tuple[int, int], Inputs],
    timer: Timer,
    *,
    phases: Sequence[Phase] = WRITING,
    dense: str,
    seconds: float,
    ceilings: Ceilings | None,
    track: Track[Any] = untracked,
) -> list[Speed]:
    """One row a contender, phase and regime; one that cannot run says why.

    Args:
        contenders: models and implementations; `dense` must be among them.
        cases: inputs by regime: (batch, positions); of WRITING prompts with the token that comes next.
        timer: of the device.
        phases: that are timed, in their order.
        dense: name of the model that others are compared with.
        seconds: how long each contender is timed on each phase of a regime.
        ceilings: None leaves floors out.
        track: wraps the loop over regimes.
    """
    rows: list[Speed] = []
    slow: set[tuple[str, str, Phase]] = set()
    # From few tokens to many.
    regimes = sorted(cases, key=lambda regime: regime[0] * regime[1])
    for regime in track(regimes, "speed", len(regimes)):
        inputs = {name: tensor.to(timer.device) for name, tensor in cases[regime].items()}
        caches: dict[str, Any] = {}
        for phase in phases:
            case = _Case(phase, regime, inputs)
            passes = [
                _Pass(release_memory, reason="it was left out at fewer tokens, where it was slow")
                if (who.name, who.implementation, phase) in slow
                else _prepare(who, case, caches, timer)
                for who in contenders
            ]
            for who in _leave_out_slow(contenders, passes, max(SLOWEST_SECONDS, SLOW_FACTOR * seconds)):
                slow.add((who.name, who.implementation, phase))
            _time(contenders, passes, timer, seconds)
            (reference,) = (one.samples for one, who in zip(passes, contenders, strict=True) if who.name == dense)
            rows += [
                _row(who, phase, regime, one, dense=None if who.name == dense else reference, ceilings=ceilings)
                for who, one in zip(contenders, passes, strict=True)
            ]
            del passes
        del caches
        release_memory()
    return rows


def _time(contenders: Sequence[Contender], passes: Sequence[_Pass], timer: Timer, seconds: float) -> None:
    """Let all that can run take turns; their passes hold the samples, or why there are none."""
    ready = {str(number): one for number, one in enumerate(passes) if not one.reason}
    samples = take_turns(
        {key: partial(_sample, contenders[int(key)], one, timer) for key, one in ready.items()}, seconds=seconds
    )
    for key, one in ready.items():
        one.samples = samples[key]
        failure = samples[key].failure
        one.reason = first_line(failure) if failure else ""


def _prepare(who: Contender, case: _Case, caches: dict[str, Any], timer: Timer) -> _Pass:
    """Everything but the samples: the pass runs once or twice, its routing is noted, prefill leaves its cache."""
    phase, inputs = case.phase, case.inputs
    if phase == "forward":
        num_tokens = case.regime[0] * case.regime[1]
        one = _Pass(partial(_forward, who.model, inputs), num_tokens, _distinct(inputs.get("input_ids")))
    elif phase == "prefill":
        ids_BP = inputs["input_ids"][:, :-1]
        one = _Pass(partial(_prefill, who.model, ids_BP), ids_BP.numel(), _distinct(ids_BP))
    elif who.name in caches:
        cache, ids_B1 = caches[who.name], inputs["input_ids"][:, -1:]
        one = _Pass(partial(_decode, who.model, ids_B1, cache), len(ids_B1), _distinct(ids_B1), cache)
    else:
        return _Pass(release_memory, reason="its prefill did not run")
    one.reason = refusal(who, one.num_tokens)
    if one.reason:
        return one
    hit = ExpertsHit()
    try:
        who.ready()
        began = time.perf_counter()
        with watching(who.model, hit.see), unchanged(one.cache):
            out = one.call()
        one.seconds = time.perf_counter() - began
        if phase == "prefill":
            caches.setdefault(who.name, out.past_key_values)
        del out
        if timer.device.type == "cuda":
            # The first pass compiled and tuned.
            one.seconds = _sample(who, one, timer)
    except Exception as error:
        one.reason = first_line(error)
    if one.reason:
        # Outside of the handler, where the error no longer holds what the pass had allocated.
        release_memory()
    one.experts_hit = hit.share
    return one


def _distinct(ids: Tensor | None) -> int:
    """Different tokens among inputs; none among images."""
    return 0 if ids is None else int(ids.unique().numel())


def _forward(model: Any, inputs: Inputs) -> Any:
    return model(**on_device(inputs, model))


def _prefill(model: Any, ids_BP: Tensor) -> Any:
    """As generation does it: keys and values of all tokens, logits of the last."""
    return model(ids_BP, use_cache=True, logits_to_keep=1)


def _decode(model: Any, ids_B1: Tensor, cache: Any) -> Any:
    return model(ids_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _leave_out_slow(contenders: Sequence[Contender], passes: Sequence[_Pass], limit: float) -> list[Contender]:
    """Who is left out; every model keeps its fastest implementation, however slow that is."""
    fastest: dict[str, float] = {}
    ran = [(who, one) for who, one in zip(contenders, passes, strict=True) if not one.reason]
    for who, one in ran:
        fastest[who.name] = min(one.seconds, fastest.get(who.name, one.seconds))
    left_out = []
    for who, one in ran:
        best = fastest[who.name]
        if one.seconds > max(limit, BEHIND_FACTOR * best):
            one.reason = f"a pass took {one.seconds:.2g} s, with another implementation {best:.2g} s"
            left_out.append(who)
    return left_out


def _sample(who: Contender, one: _Pass, timer: Timer) -> float:
    """Seconds of one pass; choosing the implementation and putting the cache back are not timed."""
    who.ready()
    with unchanged(one.cache):
        return timer.single(one.call)


@contextmanager
def unchanged(cache: Any) -> Iterator[None]:
    """Put a cache back as it was.

    Layers that grow make new tensors, so it is enough to hold on to the old ones. Not `cache.crop`, which changed its
    meaning between versions of transformers and which layers of a fixed size do not have.
    """
    before = [dict(vars(layer)) for layer in cache.layers] if cache is not None else []
    try:
        yield
    finally:
        for layer, state in zip(cache.layers if cache is not None else [], before, strict=True):
            vars(layer).clear()
            vars(layer).update(state)


def _row(
    who: Contender,
    phase: Phase,
    regime: tuple[int, int],
    one: _Pass,
    *,
    dense: Samples | None,
    ceilings: Ceilings | None,
) -> Speed:
    """One row; `dense` are the samples that it is compared with."""
    batch, prompt = regime
    row = Speed(who.name, who.implementation, phase, batch, prompt, experts_hit=one.experts_hit, reason=one.reason)
    if one.reason:
        return row
    work = pass_work(
        who.anatomy,
        phase,
        batch=batch,
        prompt=prompt,
        distinct_tokens=one.distinct_tokens,
        experts_hit=one.experts_hit,
        element_bytes=who.model.dtype.itemsize,
    )
    floor_ms = work.floor_ms(ceilings) if ceilings else None
    quantile, median = one.samples.quantile, one.samples.median
    p10, p50, p90 = (1e3 * seconds for seconds in (quantile(0.1), median, quantile(0.9)))
    ratio = over(one.samples, dense) if dense is not None and dense.seconds else (None, None, None)
    return replace(
        row,
        ms_p10=p10,
        ms_p50=p50,
        ms_p90=p90,
        num_samples=len(one.samples.seconds),
        tokens_per_second=1e3 * one.num_tokens / p50,
        examples_per_second=1e3 * batch / p50 if phase == "forward" else None,
        time_over_dense=ratio[0],
        time_over_dense_low=ratio[1],
        time_over_dense_high=ratio[2],
        bytes_read=work.bytes_read,
        flops=work.flops,
        floor_ms=floor_ms,
        time_over_floor=p50 / floor_ms if floor_ms else None,
    )


def over(samples: Samples, dense: Samples) -> tuple[float, float, float]:
    """Median of the ratios of passes of one round, and its interval (bootstrap over rounds)."""
    ratios = [own / reference for own, reference in zip(samples.seconds, dense.seconds, strict=False)]
    ratios_S = torch.tensor(ratios, dtype=torch.float64)[draws(len(ratios))]
    low, high = interval(ratios_S.quantile(0.5, dim=1))
    return statistics.median(ratios), low, high
