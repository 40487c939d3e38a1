"""The result of a model benchmark: compression, quality, speed and memory of a few checkpoints, and what experts do.

Everything is a plain number with its unit in the name; what could not be measured is None, and a reason says why.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.engines.results import EngineFile, EngineSpeed
from moeify.check.scores import Score
from moeify.check.tasks_results import TaskResult
from moeify.readable import Readable

Kind = Literal["dense", "moe", "static"]
Phase = Literal["prefill", "decode", "forward"]
Outcome = Literal["faster", "same", "slower", "cannot tell"]
# Two times are the same if their ratio is certainly that near to one; a convention, as is the threshold of --baseline.
SAME_WITHIN = 0.05
# Name of the quality over the blocks of all texts, where there are several.
ALL_TEXTS = "all texts"
# Where parameters are.
PARTS = ("embedding", "positions", "attention", "ffn", "router", "norm", "head")


@dataclass(frozen=True)
class Interval:
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Args:
        parameters: stored; a head tied to the embedding is stored with the embedding.
        active_parameters: those that a token is multiplied with; an embedding that is only looked up has none.
        flops_per_token: a multiplication and an addition are two; attention at the context of the quality texts.
        bytes_per_decoded_token: weights read for one token at batch 1; keys and values of the context are attention's.
            Zero of a model that decodes nothing.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int
    bytes_per_decoded_token: int


@dataclass(frozen=True)
class Model:
    """One checkpoint, its sizes and its memory.

    Args:
        name: unique in the run: `dense`, or the folder's name.
        path: as it was asked for.
        kind: dense, moe or static.
        model_type: of transformers.
        num_layers, num_experts, num_shared, num_active: of an moe; a shared expert counts as active. None otherwise.
        active_share: share of all FFN parameters that a token uses; of a static cut relative to the dense model.
        mean_active: experts that a token of this run's texts had, in the mean over layers, where that is a token's own:
            `active_share` and `parts` are of it, `num_active` is the most; None where all tokens have as many.
        parts: by PARTS, parts without parameters left out; totals are their sums.
        bytes_on_disk: of the weight files.
        load_peak_memory_bytes, peak_memory_bytes: of a process that only loads it, and that also runs the largest
            speed case; resident on a CPU, allocated on CUDA.
        memory_reason: why one of them is None although it was asked for.
        calibrated_on: the texts that it was calibrated or trained on by moeify; none if it was not.
    """

    name: str
    path: str
    kind: Kind
    model_type: str
    num_layers: int
    num_experts: int | None
    num_shared: int | None
    num_active: int | None
    active_share: float
    parts: Mapping[str, Part]
    bytes_on_disk: int
    load_peak_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_reason: str = ""
    calibrated_on: tuple[str, ...] = ()
    mean_active: float | None = None

    @property
    def experts_words(self) -> str:
        """Active of all experts, and those that are shared."""
        active = f"{self.num_active}" if self.mean_active is None else f"{self.mean_active:.1f} (mean)"
        return f"{active} of {self.num_experts}" + (f", {self.num_shared} shared" if self.num_shared else "")


@dataclass(frozen=True)
class Quality:
    """One model on one text; intervals are 95 % (bootstrap over blocks), ratios draw the same blocks for both.

    Args:
        model, data: what was measured on what, ALL_TEXTS for the blocks of all texts together.
        num_tokens: that were scored.
        perplexity, perplexity_low, perplexity_high: of the text.
        ratio, ratio_low, ratio_high: perplexity over the dense model's; one for itself.
        kl_nats, kl_low, kl_high: mean divergence of the model's next token distribution from the dense model's.
        top1_agreement: share of positions where both find the same token likeliest.
        over_static: of a mixture of experts, name of a static model -> perplexity over that model's.
    """

    model: str
    data: str
    num_tokens: int
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    kl_nats: float
    kl_low: float
    kl_high: float
    top1_agreement: float
    over_static: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """One model on one implementation at one batch size and prompt length.

    Args:
        model: its name.
        implementation: of experts; `dense` where there are none.
        phase: prefill runs the prompts, decode adds one token to each; of encoders, forward is one pass.
        batch: sequences, images.
        prompt_tokens: of each; of an image its positions.
        ms_p10, ms_p50, ms_p90: quantiles of one pass, milliseconds.
        num_samples: passes that were timed.
        tokens_per_second: batch * prompt_tokens, or batch, over ms_p50.
        examples_per_second: of a forward pass, batch over ms_p50: texts, or images.
        time_over_dense, time_over_dense_low, time_over_dense_high: median of the ratios of neighbouring passes, and
            their 95 % interval (bootstrap); None for the dense model itself.
        experts_hit: share of routed experts that at least one token chose, mean over layers; None without experts.
        bytes_read: at least, by one pass; flops: at least.
        floor_ms: the larger of both over the ceilings; None without `--roofline`.
        time_over_floor: ms_p50 over it.
        reason: why there is no time.
    """

    model: str
    implementation: str
    phase: Phase
    batch: int
    prompt_tokens: int
    ms_p10: float | None = None
    ms_p50: float | None = None
    ms_p90: float | None = None
    num_samples: int = 0
    tokens_per_second: float | None = None
    examples_per_second: float | None = None
    time_over_dense: float | None = None
    time_over_dense_low: float | None = None
    time_over_dense_high: float | None = None
    experts_hit: float | None = None
    bytes_read: int | None = None
    flops: int | None = None
    floor_ms: float | None = None
    time_over_floor: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """Where a model stands at one regime, on its fastest implementation.

    Args:
        model, implementation, phase, batch, prompt_tokens: of the row that it is about.
        outcome: of the interval of the ratio: `faster` or `slower` if it leaves out one; `same` if it holds one and
            ends within SAME_WITHIN of it on both sides; `cannot tell` if it is wider.
        time_over_dense, time_over_dense_low, time_over_dense_high: of that row.
        why: a sentence, e.g. which share of the experts the batch hit.
    """

    model: str
    implementation: str
    phase: Phase
    batch: int
    prompt_tokens: int
    outcome: Outcome
    time_over_dense: float
    why: str
    time_over_dense_low: float | None = None
    time_over_dense_high: float | None = None


@dataclass(frozen=True)
class LayerExperts:
    """What the routed experts of one layer do on the quality texts.

    Args:
        layer: index in the model.
        load: share of all choices that each expert got; sums to one.
        coactivation: for experts i and j the share of tokens that chose both, over what independent choices of the
            same loads would give, minus one; zero on the diagonal.
        oracle_capture: share of what the best possible choice of experts adds (squared norms of outputs) that the
            router's choice adds; one is perfect.
        random_capture: the same for a random choice.
        top_tokens: for each expert the tokens, as text, whose share among those it was chosen for is largest relative
            to their share of the text.
        texts: name of each text, if there are several -> what `load` is on it alone.
    """

    layer: int
    load: tuple[float, ...]
    coactivation: tuple[tuple[float, ...], ...]
    oracle_capture: float
    random_capture: float
    top_tokens: tuple[tuple[str, ...], ...]
    texts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """The beginning of a text, and how each model goes on: its likeliest token, again and again.

    Args:
        data: the text.
        prompt: its beginning.
        continuations: by model.
    """

    data: str
    prompt: str
    continuations: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """One number of this run beside that of an earlier one; less is better.

    Args:
        row: whose it is.
        what: time over dense, perplexity over dense, parameters, active parameters or bytes on disk.
        old, new, ratio: then, now, now over then.
        worse: past the threshold, and past the noise: its interval lies above the old one's.
    """

    row: str
    what: str
    old: float
    new: float
    ratio: float
    worse: bool


@dataclass(frozen=True)
class Regressions:
    """This run against an earlier one.

    Args:
        baseline: where that is.
        threshold: ratio that is still allowed.
        changes: of all numbers that both have.
        missing: numbers that only the earlier one has.
    """

    baseline: str
    threshold: float
    changes: tuple[Change, ...]
    missing: tuple[str, ...]

    @property
    def worse(self) -> list[Change]:
        return [change for change in self.changes if change.worse]


@dataclass(repr=False)
class ModelBench(Readable):
    """A run of `moeify bench`.

    Args:
        date: when it began, UTC, ISO 8601.
        command: that gives it again.
        machine, versions: where it was measured.
        dtype: of weights; the types of the GGUF files where transformers runs none.
        context: tokens of a block of the quality texts, or of an example.
        models: the dense one first.
        quality, samples, speed, verdicts: rows.
        scores: rows of models that write no text, by their own measure.
        tasks: rows, with `--tasks`.
        experts: by model name.
        engine_files, engine_speed: rows of other engines, with `--engine llama.cpp`.
        ceilings: of this machine in this run, with `--roofline`.
        regressions: against an earlier run, with `--baseline`.
    """

    date: str
    command: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    dtype: str
    context: int
    models: list[Model] = field(default_factory=list)
    quality: list[Quality] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    tasks: list[TaskResult] = field(default_factory=list)
    experts: dict[str, list[LayerExperts]] = field(default_factory=dict)
    engine_files: list[EngineFile] = field(default_factory=list)
    engine_speed: list[EngineSpeed] = field(default_factory=list)
    ceilings: Ceilings | None = None
    regressions: Regressions | None = None
