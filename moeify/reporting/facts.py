"""The numbers of a benchmark put together: quality over all texts, speed over all regimes, the fair static control."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from moeify.benchmark.engines.results import EngineFile, EngineSpeed
from moeify.benchmark.models.results import Interval, Kind, Model, ModelBench, Phase, Quality, Verdict

# A static model is a fair control if a token uses as many of its parameters, to within this share.
SAME_SIZE = 0.05
ALL_TEXTS = "all texts"


@dataclass(frozen=True)
class Facts:
    """One model of a run against the dense one.

    Args:
        model, dense: the two.
        quality: over all texts; None if it was not measured.
        decode, prefill: each regime on the fastest implementation, in the order of prompt length and batch; empty if
            they were not measured.
        control: of a mixture of experts the fair static control; None if there is none.
        engine_files, engine_speed: its rows of other engines.
    """

    model: Model
    dense: Model
    quality: Quality | None
    decode: tuple[Verdict, ...]
    prefill: tuple[Verdict, ...]
    control: "Facts | None"
    engine_files: tuple[EngineFile, ...] = ()
    engine_speed: tuple[EngineSpeed, ...] = ()

    @property
    def regimes(self) -> tuple[Verdict, ...]:
        return self.decode + self.prefill

    @property
    def ratio(self) -> Interval | None:
        """Perplexity over the dense model's."""
        return None if self.quality is None else ratio_of(self.quality)

    @property
    def over_control(self) -> Interval | None:
        """Perplexity over the control's, from the same blocks of text; None if that was not measured."""
        if self.quality is None or self.control is None:
            return None
        return self.quality.over_static.get(self.control.model.name)

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from the control to the dense model, in log-perplexity."""
        control = self.control.ratio if self.control else None
        if self.ratio is None or control is None or control.value <= 1:
            return None
        return 1 - math.log(self.ratio.value) / math.log(control.value)

    @property
    def memory(self) -> float | None:
        """Peak memory over the dense model's."""
        own, dense = self.model.peak_memory_bytes, self.dense.peak_memory_bytes
        return own / dense if own and dense else None

    @property
    def disk(self) -> float | None:
        """Bytes on disk over the dense model's."""
        return self.model.bytes_on_disk / self.dense.bytes_on_disk if self.dense.bytes_on_disk else None


def speeds(regimes: Sequence[Verdict]) -> tuple[float, float] | None:
    """Least and largest speed as a multiple of the dense model's; None if nothing was timed."""
    values = [1 / regime.time_over_dense for regime in regimes]
    return (min(values), max(values)) if values else None


def parameters(model: Model) -> int:
    return sum(part.parameters for part in model.parts.values())


def active_parameters(model: Model) -> int:
    return sum(part.active_parameters for part in model.parts.values())


def of_kind(bench: ModelBench, kind: Kind) -> list[Model]:
    return [model for model in bench.models if model.kind == kind]


def facts_of(bench: ModelBench, model: Model) -> Facts:
    """All that is known of a model; `bench` has a dense one."""
    control = _control(bench, model) if model.kind == "moe" else None
    return Facts(
        model=model,
        dense=of_kind(bench, "dense")[0],
        quality=quality_of(bench, model.name),
        decode=_regimes(bench, model.name, "decode"),
        prefill=_regimes(bench, model.name, "prefill"),
        control=facts_of(bench, control) if control else None,
        engine_files=tuple(row for row in bench.engine_files if row.model == model.name),
        engine_speed=tuple(row for row in bench.engine_speed if row.model == model.name),
    )


def ratio_of(row: Quality) -> Interval:
    return Interval(row.ratio, row.ratio_low, row.ratio_high)


def quality_of(bench: ModelBench, name: str) -> Quality | None:
    """A model over all texts of the run, each weighted by its tokens; None if it was measured on none."""
    rows = [row for row in bench.quality if row.model == name]
    if len(rows) < 2:
        return rows[0] if rows else None
    total = sum(row.num_tokens for row in rows)
    weights = [row.num_tokens / total for row in rows]

    def pooled(name: str, prefix: str, *maps: Callable[[float], float]) -> dict[str, Any]:
        names = (name, f"{prefix}_low", f"{prefix}_high")
        one = _pooled([Interval(*(getattr(row, part) for part in names)) for row in rows], weights, *maps)
        return dict(zip(names, astuple(one), strict=True))

    controls = [control for control in rows[0].over_static if all(control in row.over_static for row in rows)]
    return Quality(
        model=name,
        data=ALL_TEXTS,
        num_tokens=total,
        **pooled("perplexity", "perplexity"),
        **pooled("ratio", "ratio"),
        **pooled("kl_nats", "kl", float, float),
        top1_agreement=sum(weight * row.top1_agreement for weight, row in zip(weights, rows, strict=True)),
        over_static={control: _pooled([row.over_static[control] for row in rows], weights) for control in controls},
    )


def _pooled(
    parts: Sequence[Interval],
    weights: Sequence[float],
    warp: Callable[[float], float] = math.log,
    back: Callable[[float], float] = math.exp,
) -> Interval:
    """The weighted mean of logarithms; halves of intervals add in quadrature, as texts are independent."""
    pairs = list(zip(weights, parts, strict=True))
    middle = sum(weight * warp(part.value) for weight, part in pairs)
    below = math.hypot(*(weight * (warp(part.value) - warp(part.low)) for weight, part in pairs))
    above = math.hypot(*(weight * (warp(part.high) - warp(part.value)) for weight, part in pairs))
    return Interval(back(middle), back(middle - below), back(middle + above))


def _regimes(bench: ModelBench, name: str, phase: Phase) -> tuple[Verdict, ...]:
    rows = [row for row in bench.verdicts if row.model == name and row.phase == phase]
    return tuple(sorted(rows, key=lambda row: (row.prompt_tokens, row.batch)))


def _control(bench: ModelBench, model: Model) -> Model | None:
    """The static model whose tokens use as many parameters."""
    size = active_parameters(model)
    near = sorted(of_kind(bench, "static"), key=lambda static: abs(active_parameters(static) - size))
    return next((static for static in near if abs(active_parameters(static) - size) <= SAME_SIZE * size), None)
