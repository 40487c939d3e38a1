"""What was lost, what was gained, and whether to use it: sentences that follow from the numbers by fixed rules.

RULES says which; the page prints them. `Faster` and `slower` are the benchmark's verdicts: the 95 % interval of the
time ratio leaves out one. The limits are conventions, not measurements: 5 % is taken for a loss that a user accepts
without asking, 50 % for one that no speed is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moeify.benchmark.models.results import Verdict
from moeify.reporting.facts import Facts, Interval, active_parameters, parameters
from moeify.reporting.words import count, factor, listing, percent

Level = Literal["yes", "partly", "no", "unknown"]

SMALL_LOSS = 1.05
LARGE_LOSS = 1.5
# Memory and disk differ when they differ by this share.
NOTABLE = 0.05
# In their order; the first that applies gives the advice.
RULES = (
    "Quality or speed was not measured: no advice.",
    "Pruning to the same active size is certainly better, and mostly as fast or faster: do not use it.",
    f"Nothing gained (nowhere faster, neither memory nor disk at least {NOTABLE * 100:g} % smaller): do not use it.",
    f"Perplexity above {LARGE_LOSS:g} times the dense model's: not as it is.",
    f"The 95 % interval of the perplexity ratio ends at or below {SMALL_LOSS:g}: use it where it is not slower.",
    "Otherwise: only if the gain is worth the loss.",
)
CONVENTION = (
    "Pruning is the static control: by rule 2 its interval of perplexity lies below the model's, without overlap, and "
    "its time is no longer in at least half of the regimes that both were measured in. Faster and slower mean that the "
    "95 % interval of the time ratio leaves out one. Over several texts perplexities are pooled by tokens. The limits "
    "are conventions of this report, not measurements."
)


@dataclass(frozen=True)
class Advice:
    """Whether to use a model.

    Args:
        level: how far.
        sentence: what to do and why.
    """

    level: Level
    sentence: str


@dataclass(frozen=True)
class Answers:
    """The three answers that a newcomer wants.

    Args:
        lost, gained: sentences, the most important first.
        advice: whether to use it.
    """

    lost: tuple[str, ...]
    gained: tuple[str, ...]
    advice: Advice


def answers(facts: Facts) -> Answers:
    return Answers(tuple(_lost(facts)), tuple(_gained(facts)), advise(facts))


def advise(facts: Facts) -> Advice:
    """The first rule that applies."""
    if facts.quality is None or not facts.phases:
        missing = "quality" if facts.quality is None else "speed"
        return Advice("unknown", f"Its {missing} was not measured.")
    ratio = facts.quality.ratio
    if facts.control is not None and facts.control_quality is not None and is_beaten(facts):
        times = f"{factor(facts.control_quality.ratio.value)} against {factor(ratio.value)} times the dense perplexity"
        both = (
            ", and is mostly as fast or faster" if facts.control_decode.regimes + facts.control_prefill.regimes else ""
        )
        why = f"plain pruning to the same active size ({facts.control.name}) loses less, {times}{both}"
        return Advice("no", f"Do not use it: {why}.")
    faster = _where(facts, "faster")
    gain = "; ".join([f"faster for {faster}"] * bool(faster) + _smaller(facts))
    if gain:
        return _weigh(ratio, gain, _where(facts, "slower"))
    if ratio.low > 1:
        return Advice("no", f"Do not use it: nowhere faster than the dense model, and {quality_words(ratio)}.")
    return Advice("no", f"No reason to use it: nowhere faster than the dense model; {quality_words(ratio)}.")


def _weigh(ratio: Interval, gain: str, slower: str) -> Advice:
    """What the gain is worth, by rules 4 to 6."""
    if ratio.value > LARGE_LOSS:
        what = "Fine-tune it first (moeify finetune), or let more experts be active"
        return Advice("no", f"Not as it is: {gain}, but {quality_words(ratio)}. {what}.")
    if ratio.high > SMALL_LOSS:
        only = f"Only if the gain is worth the loss: {gain}, but {quality_words(ratio)}."
        return Advice("partly", f"{only} Keep the dense model for {slower}." if slower else only)
    if slower:
        lost = f" ({quality_words(ratio)})" if ratio.low > 1 else ""
        return Advice("partly", f"Use it where it gains ({gain}){lost}; keep the dense model for {slower}.")
    return Advice("yes", f"Use it: {gain}; {quality_words(ratio)}.")


def is_beaten(facts: Facts) -> bool:
    """Whether the static control is certainly better, and mostly no slower."""
    own, other = facts.quality, facts.control_quality
    if own is None or other is None or other.ratio.high >= own.ratio.low:
        return False
    times = _times(facts.decode.regimes + facts.prefill.regimes)
    others = _times(facts.control_decode.regimes + facts.control_prefill.regimes)
    both = times.keys() & others.keys()
    return 2 * sum(others[regime] <= times[regime] for regime in both) >= len(both)


def control_words(facts: Facts) -> str:
    """How the model stands to its static control; empty if there is none or quality is missing."""
    own, other = facts.quality, facts.control_quality
    if facts.control is None or own is None or other is None:
        return ""
    numbers = f"{factor(own.ratio.value)} against {factor(other.ratio.value)} times the dense perplexity"
    if own.ratio.high < other.ratio.low:
        closed = facts.gap_closed
        share = f", {percent(closed)} of the way to dense" if closed is not None and closed > 0 else ""
        return f"Better than plain pruning to the same active size: {numbers}{share}."
    if other.ratio.high < own.ratio.low:
        return f"Worse than plain pruning to the same active size: {numbers}."
    return f"No better than plain pruning to the same active size, within the noise: {numbers}."


def quality_words(ratio: Interval) -> str:
    """A clause about a perplexity ratio."""
    if ratio.low > 1:
        # A doubling is easier to grasp as a factor, a small change as a percentage.
        if ratio.value >= LARGE_LOSS:
            return f"perplexity is {factor(ratio.value)} times the dense model's"
        return f"perplexity is {percent(ratio.value - 1)} higher"
    if ratio.high < 1:
        return f"perplexity is {percent(1 - ratio.value)} lower"
    return "perplexity is the dense model's, within the noise"


def _lost(facts: Facts) -> list[str]:
    found = []
    if facts.quality is not None:
        ratio = facts.quality.ratio
        edges = f"95 % interval of the ratio: {factor(ratio.low)} to {factor(ratio.high)}"
        found.append(f"{_capital(quality_words(ratio))} ({edges}).")
        found.append(
            f"Its likeliest next token is the dense model's at {percent(facts.quality.top1_agreement)} of positions."
        )
    if slower := _where(facts, "slower"):
        least = min(phase.speeds[0] for phase in facts.phases)
        found.append(f"Slower for {slower}, down to {factor(least)}x.")
    for what, ratio_or_none in (("Peak memory", facts.memory), ("The checkpoint", facts.disk)):
        if ratio_or_none is not None and ratio_or_none > 1 + NOTABLE:
            found.append(f"{what} is {factor(ratio_or_none)} times as large.")
    if words := control_words(facts):
        found += [words] if not words.startswith("Better") else []
    return found


def _gained(facts: Facts) -> list[str]:
    active, dense = active_parameters(facts.model), active_parameters(facts.dense)
    found = [f"A token uses {count(active)} of {count(parameters(facts.model))} parameters; dense: {count(dense)}."]
    if faster := _where(facts, "faster"):
        most = max(phase.speeds[1] for phase in facts.phases)
        found.append(f"Faster for {faster}, up to {factor(most)}x.")
    elif facts.phases:
        found.append("No speed: nowhere faster than the dense model.")
    found += [f"{_capital(words)}." for words in _smaller(facts)]
    if (words := control_words(facts)).startswith("Better"):
        found.append(words)
    return found


def _smaller(facts: Facts) -> list[str]:
    shares = (("memory", facts.memory), ("disk", facts.disk))
    return [f"{percent(1 - share)} less {what}" for what, share in shares if share and share < 1 - NOTABLE]


def _where(facts: Facts, outcome: str) -> str:
    """The regimes with an outcome: `decode at batch 1 and 4, and prefill everywhere`."""
    found = []
    for phase in facts.phases:
        regimes = phase.having(outcome)
        if regimes:
            everywhere = len(regimes) == len(phase.regimes) > 1
            found.append(f"{phase.phase} {'everywhere' if everywhere else _regimes(regimes, phase.regimes)}")
    return ", and ".join(found)


def _regimes(regimes: Sequence[Verdict], of: Sequence[Verdict]) -> str:
    """`at batch 1 and 4`, for each prompt length if the run has several."""
    lengths = sorted({regime.prompt_tokens for regime in regimes})
    several = len({regime.prompt_tokens for regime in of}) > 1
    groups = []
    for length in lengths:
        batches = listing([regime.batch for regime in regimes if regime.prompt_tokens == length])
        groups.append(f"at batch {batches}" + (f" of {length:,} tokens" if several else ""))
    return ", ".join(groups)


def _times(regimes: Sequence[Verdict]) -> dict[tuple[str, int, int], float]:
    return {(row.phase, row.batch, row.prompt_tokens): row.time_over_dense for row in regimes}


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
