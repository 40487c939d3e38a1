"""The numbers of a benchmark put together: quality over all texts, speed over all regimes, the fair static control."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from moeify.benchmark.engines.results import EngineFile
from moeify.benchmark.models.results import ALL_TEXTS, Interval, Kind, Model, ModelBench, Phase, Quality, Verdict
from moeify.benchmark.models.verdicts import engine_verdicts
from moeify.words import count

# A static model is a fair control if a token uses as many of its parameters, to within this share.
SAME_SIZE = 0.05
# Names of results that compare a model with the dense one.
AGREEMENT, COSINE = "agreement", "feature cosine"
EMBEDDED = ("builtin", "builtin-vit")


@dataclass(frozen=True)
class Likeness:
    """How near a model's work stays to the dense one's: one if it is the same.

    Args:
        value: share of examples with the same class, else the cosine of features; of several sets and sources the mean.
        low, high: its 95 % interval; of a cosine, which has none, the value.
        words: its name.
    """

    value: float
    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Facts:
    """One model of a run against the dense one.

    Args:
        model, dense: the two.
        quality: over all texts; None if it was not measured.
        decode, prefill, forward: each regime on the fastest implementation, in the order of prompt length and batch;
            empty if they were not measured.
        control: of a mixture of experts the fair static control; None if there is none.
        engine: each regime of its files in other engines.
        engine_files: those files.
        on_gpu: where transformers ran.
        likeness: of a model that writes no text, how near it stays to the dense one; None if that was not measured.
    """

    model: Model
    dense: Model
    quality: Quality | None
    decode: tuple[Verdict, ...]
    prefill: tuple[Verdict, ...]
    control: "Facts | None"
    engine: tuple[Verdict, ...] = ()
    engine_files: tuple[EngineFile, ...] = ()
    on_gpu: bool = False
    forward: tuple[Verdict, ...] = ()
    likeness: "Likeness | None" = None

    @property
    def in_transformers(self) -> tuple[Verdict, ...]:
        return self.decode + self.prefill + self.forward

    @property
    def regimes(self) -> tuple[Verdict, ...]:
        return self.in_transformers + self.engine

    @property
    def ratio(self) -> Interval | None:
        """Perplexity over the dense model's."""
        row = self.quality
        return None if row is None else Interval(row.ratio, row.ratio_low, row.ratio_high)

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

    @property
    def bytes_read(self) -> float | None:
        """What a decoded token reads over what one of the dense model does."""
        own, dense = read_for_token(self.model), read_for_token(self.dense)
        return own / dense if own and dense else None


def speeds(regimes: Sequence[Verdict]) -> tuple[float, float] | None:
    """Least and largest speed as a multiple of the dense model's; None if nothing was timed."""
    values = [1 / regime.time_over_dense for regime in regimes]
    return (min(values), max(values)) if values else None


def parameters(model: Model) -> int:
    return sum(part.parameters for part in model.parts.values())


def active_parameters(model: Model) -> int:
    return sum(part.active_parameters for part in model.parts.values())


def read_for_token(model: Model) -> int:
    return sum(part.bytes_per_decoded_token for part in model.parts.values())


def of_kind(bench: ModelBench, kind: Kind) -> list[Model]:
    return [model for model in bench.models if model.kind == kind]


def demonstration(bench: ModelBench) -> str:
    """A warning about results of the embedded model; empty for a model that someone uses."""
    dense = of_kind(bench, "dense")[0]
    if dense.path not in EMBEDDED:
        return ""
    return (
        f"This is a demonstration: the embedded model has {count(parameters(dense))} parameters and was trained for a "
        "minute. Its numbers show what is measured, not what to expect of your model."
    )


def facts_of(bench: ModelBench, model: Model) -> Facts:
    """All that is known of a model; `bench` has a dense one."""
    control = _control(bench, model) if model.kind == "moe" else None
    rows = [row for row in bench.engine_speed if row.model == model.name]
    return Facts(
        model=model,
        dense=of_kind(bench, "dense")[0],
        quality=quality_of(bench, model.name),
        decode=_regimes(bench, model.name, "decode"),
        prefill=_regimes(bench, model.name, "prefill"),
        forward=_regimes(bench, model.name, "forward"),
        likeness=likeness_of(bench, model.name),
        control=facts_of(bench, control) if control else None,
        engine=tuple(engine_verdicts(sorted(rows, key=lambda row: row.phase))),
        engine_files=tuple(row for row in bench.engine_files if row.model == model.name),
        on_gpu=bench.machine.get("device", "cpu") != "cpu",
    )


def quality_of(bench: ModelBench, name: str) -> Quality | None:
    """A model over all texts of the run; None if it was measured on none."""
    rows = {row.data: row for row in bench.quality if row.model == name}
    return rows.get(ALL_TEXTS) or next(iter(rows.values()), None)


def likeness_of(bench: ModelBench, name: str) -> Likeness | None:
    """Classes say more of a model's work than features do; perplexities have their own ratio."""
    classes = [row for row in bench.tasks if row.model == name and row.metric == AGREEMENT]
    cosines = [row.value for row in bench.scores if row.model == name and row.measure == COSINE]
    if classes:
        value, low, high = (fmean(getattr(row, end) for row in classes) for end in ("score", "score_low", "score_high"))
        return Likeness(value, low, high, "of its classes are the dense model's")
    if cosines:
        mean = fmean(cosines)
        return Likeness(mean, mean, mean, "is the cosine of its features and the dense model's")
    return None


def _regimes(bench: ModelBench, name: str, phase: Phase) -> tuple[Verdict, ...]:
    rows = [row for row in bench.verdicts if row.model == name and row.phase == phase]
    return tuple(sorted(rows, key=lambda row: (row.prompt_tokens, row.batch)))


def _control(bench: ModelBench, model: Model) -> Model | None:
    """Of the static models whose tokens use as many parameters the one that is hardest to beat."""

    def loss(static: Model) -> float:
        row, likeness = quality_of(bench, static.name), likeness_of(bench, static.name)
        if row is None:
            return math.inf if likeness is None else -likeness.value
        return row.perplexity

    size = active_parameters(model)
    near = [one for one in of_kind(bench, "static") if abs(active_parameters(one) - size) <= SAME_SIZE * size]
    return min(near, key=loss, default=None)
