"""What the numbers of a benchmark come to: quality over all texts, speed over all regimes, the fair static control."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeify.benchmark.models.results import Kind, Model, ModelBench, Phase, Quality, Verdict

# A static model is a fair control if a token uses as many of its parameters, to within this share.
SAME_SIZE = 0.05


@dataclass(frozen=True)
class Interval:
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ModelQuality:
    """A model over all texts, each weighted by its tokens.

    Args:
        perplexity: of all tokens together.
        ratio: to the dense model. Of several texts the intervals' halves, in logarithms, are added in quadrature, as
            for independent texts.
        kl_nats, top1_agreement: means; see moeify.benchmark.model_results.Quality.
        num_tokens: of all texts.
        rows: one a text.
    """

    perplexity: float
    ratio: Interval
    kl_nats: float
    top1_agreement: float
    num_tokens: int
    rows: tuple[Quality, ...]


@dataclass(frozen=True)
class PhaseSpeed:
    """A model's prefill or decode against the dense model's, each regime on the fastest implementation.

    Args:
        phase: prefill or decode.
        regimes: of the run, in the order of prompt length and batch.
    """

    phase: Phase
    regimes: tuple[Verdict, ...]

    def having(self, outcome: str) -> tuple[Verdict, ...]:
        return tuple(regime for regime in self.regimes if regime.outcome == outcome)

    @property
    def speeds(self) -> tuple[float, float]:
        """Least and largest speed as a multiple of the dense model's."""
        found = [1 / regime.time_over_dense for regime in self.regimes]
        return min(found), max(found)


@dataclass(frozen=True)
class Facts:
    """One model of a run against the dense one.

    Args:
        model, dense: the two.
        quality: None if it was not measured.
        prefill, decode: speeds; without regimes if they were not measured.
        control: the fair static control, and None for a model that has none.
        control_quality, control_prefill, control_decode: the same figures of it.
    """

    model: Model
    dense: Model
    quality: ModelQuality | None
    prefill: PhaseSpeed
    decode: PhaseSpeed
    control: Model | None
    control_quality: ModelQuality | None
    control_prefill: PhaseSpeed
    control_decode: PhaseSpeed

    @property
    def phases(self) -> tuple[PhaseSpeed, ...]:
        """Those that were measured."""
        return tuple(phase for phase in (self.decode, self.prefill) if phase.regimes)

    @property
    def memory(self) -> float | None:
        """Peak memory over the dense model's."""
        own, dense = self.model.peak_memory_bytes, self.dense.peak_memory_bytes
        return own / dense if own and dense else None

    @property
    def disk(self) -> float | None:
        """Bytes on disk over the dense model's."""
        return self.model.bytes_on_disk / self.dense.bytes_on_disk if self.dense.bytes_on_disk else None

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from the control to the dense model, in log-perplexity."""
        if self.quality is None or self.control_quality is None or self.control_quality.ratio.value <= 1:
            return None
        return 1 - math.log(self.quality.ratio.value) / math.log(self.control_quality.ratio.value)


def parameters(model: Model) -> int:
    return sum(part.parameters for part in model.parts.values())


def active_parameters(model: Model) -> int:
    return sum(part.active_parameters for part in model.parts.values())


def of_kind(bench: ModelBench, kind: Kind) -> list[Model]:
    return [model for model in bench.models if model.kind == kind]


def facts_of(bench: ModelBench, model: Model) -> Facts:
    """All that is known of a model; `bench` has a dense one."""
    control = _control(bench, model) if model.kind == "moe" else None
    name = control.name if control else ""
    return Facts(
        model=model,
        dense=of_kind(bench, "dense")[0],
        quality=quality_of(bench, model.name),
        prefill=_speed(bench, model.name, "prefill"),
        decode=_speed(bench, model.name, "decode"),
        control=control,
        control_quality=quality_of(bench, name),
        control_prefill=_speed(bench, name, "prefill"),
        control_decode=_speed(bench, name, "decode"),
    )


def quality_of(bench: ModelBench, name: str) -> ModelQuality | None:
    """A model over all texts of the run; None if it was measured on none."""
    rows = tuple(row for row in bench.quality if row.model == name)
    total = sum(row.num_tokens for row in rows)
    if not total:
        return None
    weights = [row.num_tokens / total for row in rows]

    def mean(values: Sequence[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def edge(values: Sequence[float]) -> float:
        return math.sqrt(sum((weight * value) ** 2 for weight, value in zip(weights, values, strict=True)))

    ratio = mean([math.log(row.ratio) for row in rows])
    return ModelQuality(
        perplexity=math.exp(mean([math.log(row.perplexity) for row in rows])),
        ratio=Interval(
            math.exp(ratio),
            math.exp(ratio - edge([math.log(row.ratio / row.ratio_low) for row in rows])),
            math.exp(ratio + edge([math.log(row.ratio_high / row.ratio) for row in rows])),
        ),
        kl_nats=mean([row.kl_nats for row in rows]),
        top1_agreement=mean([row.top1_agreement for row in rows]),
        num_tokens=total,
        rows=rows,
    )


def _speed(bench: ModelBench, name: str, phase: Phase) -> PhaseSpeed:
    found = [row for row in bench.verdicts if row.model == name and row.phase == phase]
    return PhaseSpeed(phase, tuple(sorted(found, key=lambda row: (row.prompt_tokens, row.batch))))


def _control(bench: ModelBench, model: Model) -> Model | None:
    """The static model whose tokens use as many parameters."""
    size = active_parameters(model)
    near = sorted(of_kind(bench, "static"), key=lambda static: abs(active_parameters(static) - size))
    return next((static for static in near if abs(active_parameters(static) - size) <= SAME_SIZE * size), None)
