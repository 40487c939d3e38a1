"""The answers of a report: what was lost, what was gained, and whether to use a model, for each kind of reader."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moeify.benchmark.models.results import Verdict
from moeify.command_line import command_line, quoted
from moeify.reporting import verdict
from moeify.reporting.facts import Facts, active_parameters, parameters, speeds
from moeify.reporting.verdict import Advice
from moeify.words import count, factor, percent


@dataclass(frozen=True)
class Reading:
    """The advice for one kind of reader.

    Args:
        reader: where they run models.
        advice: by the regimes that concern them; unknown if none was measured.
        command: that measures it; empty if it was.
    """

    reader: str
    advice: Advice
    command: str = ""


@dataclass(frozen=True)
class Answers:
    """The three answers that a newcomer wants.

    Args:
        lost, gained: sentences, the most important first.
        advice: whether to use it, over all regimes.
        readers: the same for each kind of reader.
    """

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    advice: Advice
    readers: tuple[Reading, ...]


Concerns = Callable[[Facts, Verdict], bool]


def _in_transformers(*, gpu: bool, many: bool | None = None) -> Concerns:
    """Regimes of transformers there, with one sequence, or many, or any number."""
    return lambda facts, row: row in facts.in_transformers and facts.on_gpu is gpu and many in (None, row.batch > 1)


# Who asks, which regimes concern them, and what more `moeify bench` needs to be told to measure those.
READERS: tuple[tuple[str, Concerns, str], ...] = (
    ("A file on a CPU (llama.cpp)", lambda facts, row: row in facts.engine, "--engine llama.cpp"),
    ("A CPU (transformers)", _in_transformers(gpu=False), "--device cpu"),
    ("A GPU, one request at a time", _in_transformers(gpu=True, many=False), "--device cuda"),
    ("A GPU server, many requests at once", _in_transformers(gpu=True, many=True), "--device cuda --batch 32"),
)


def answers(facts: Facts, command: str, folder: Path) -> Answers:
    """All answers about a model.

    Args:
        facts: about it.
        command: of the benchmark.
        folder: of the run; what is measured later goes beside it.
    """
    overall = verdict.advise(facts)
    again = f"{command} --engine transformers"
    # llama.cpp has no encoders, and `moeify plan` is about decoding.
    writes = not facts.forward
    asked = READERS if writes else READERS[1:]
    readers = [_reading(facts, reader, concerns, f"{again} {more}", folder) for reader, concerns, more in asked]
    small = [_small_gpu(facts)] if writes else []
    return Answers(tuple(_lost(facts)), tuple(_gained(facts)), overall, (*readers, *small))


def _reading(facts: Facts, reader: str, concerns: Concerns, command: str, folder: Path) -> Reading:
    if not any(concerns(facts, regime) for regime in facts.regimes):
        # The last -o counts, but a reader would wonder about two.
        plain, out = re.sub(r" (-o|--out) ('[^']*'|\S+)| --overwrite", "", command), quoted(["-o", f"{folder}-more"])
        return Reading(reader, Advice("unknown", "Not measured."), f"{plain} {out}")

    def part(regimes: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
        return tuple(regime for regime in regimes if concerns(facts, regime))

    decode, prefill, engine = part(facts.decode), part(facts.prefill), part(facts.engine)
    here = replace(facts, decode=decode, prefill=prefill, forward=part(facts.forward), engine=engine)
    return Reading(reader, verdict.advise(here))


def _small_gpu(facts: Facts) -> Reading:
    """Sizes alone: nothing was timed where a model does not fit."""
    words = "Not measured."
    if facts.disk and facts.bytes_read:
        read, speed = factor(facts.bytes_read), factor(1 / facts.bytes_read)
        words += f" It needs {factor(facts.disk)} of the dense model's memory, and a token reads {read} of its bytes: "
        words += f"{speed} times its speed is the most to hope for."
    if facts.control and facts.control.disk:
        words += f" Plain pruning to the same active size needs {factor(facts.control.disk)} of the memory."
    plan = command_line("plan", facts.dense.path, vram="6GB", gpu_bandwidth=250)
    return Reading("A GPU that the model does not fit", Advice("unknown", words), plan)


def _lost(facts: Facts) -> list[str]:
    lines = []
    if facts.quality is not None and facts.ratio is not None:
        edges = f"95 % interval of the ratio: {factor(facts.ratio.low)} to {factor(facts.ratio.high)}"
        agreement = percent(facts.quality.top1_agreement)
        lines.append(f"{_capital(verdict.quality_words(facts.ratio))} ({edges}).")
        lines.append(f"Its likeliest next token is the dense model's at {agreement} of positions.")
    elif facts.likeness is not None:
        lines.append(f"{_capital(verdict.likeness_words(facts.likeness))}.")
        if pruned := verdict.pruned_words(facts):
            lines.append(f"{_capital(pruned)}.")
    if slower := verdict.where(facts, "slower"):
        lines.append(f"Slower for {slower}, down to {factor(min(speeds(facts.in_transformers) or ()))}x.")
    for what, ratio in (("Peak memory", facts.memory), ("The checkpoint", facts.disk)):
        if ratio is not None and ratio > 1 + verdict.NOTABLE:
            lines.append(f"{what} is {factor(ratio)} times as large.")
    lines += [f"In {row.engine} ({row.type}): {row.reason}." for row in facts.engine_files if row.reason]
    if not verdict.where(facts, "faster", ("engine",)):
        lines += filter(None, [verdict.engine_words(facts)])
    return lines + [words for words in [verdict.control_words(facts)] if words.startswith("Worse")]


def _gained(facts: Facts) -> list[str]:
    active, dense = active_parameters(facts.model), active_parameters(facts.dense)
    lines = [f"A token uses {count(active)} of {count(parameters(facts.model))} parameters; dense: {count(dense)}."]
    if faster := verdict.where(facts, "faster"):
        lines.append(f"Faster for {faster}, up to {factor(max(speeds(facts.in_transformers) or ()))}x.")
    elif facts.regimes and not verdict.where(facts, "faster", ("engine",)):
        lines.append(f"No speed: {verdict.not_faster(facts)}.")
    lines += [f"{_capital(words)}." for words in verdict.smaller(facts)]
    if verdict.where(facts, "faster", ("engine",)):
        lines.append(verdict.engine_words(facts))
    return lines + [words for words in [verdict.control_words(facts)] if words and not words.startswith("Worse")]


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
