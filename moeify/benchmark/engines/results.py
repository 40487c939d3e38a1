"""Rows of `moeify bench --engine llama.cpp`: each file and each time; plain numbers with their units in the name."""

from dataclasses import dataclass

from moeify.benchmark.options import EngineName


@dataclass(frozen=True)
class EngineFile:
    """One model as one file of an engine.

    Args:
        model: its name in the run.
        engine: that read the file.
        type: of the file's weights.
        num_bytes: of the file; None if it could not be written.
        perplexity: by the engine's own program, over the second halves of blocks of text.
        over_transformers: it over that of transformers in float32 on the same tokens, from the folder the file was
            made of; near one if the engine computes the same model. None without a folder.
        over_dense: it over the dense model's file of the same type.
        reason: why a number is missing that was asked for; begins with `no file`, `no perplexity` or `cannot run`.
    """

    model: str
    engine: EngineName
    type: str
    num_bytes: int | None = None
    perplexity: float | None = None
    over_transformers: float | None = None
    over_dense: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class EngineSpeed:
    """One file of an engine at one regime, of one sequence.

    Args:
        model, engine, type: of the file.
        threads: of the CPU.
        phase: prefill reads so many tokens at once, decode writes them one by one.
        num_tokens: how many.
        ms_per_token: median of the rounds, milliseconds.
        tokens_per_second: its inverse.
        time_over_dense, time_over_dense_low, time_over_dense_high: median, least and largest of the rounds' ratios to
            the dense model's file of that type, timed in the same round; None for the dense model itself.
        num_rounds: that were timed.
    """

    model: str
    engine: EngineName
    type: str
    threads: int
    phase: str
    num_tokens: int
    ms_per_token: float
    tokens_per_second: float
    time_over_dense: float | None
    time_over_dense_low: float | None
    time_over_dense_high: float | None
    num_rounds: int
