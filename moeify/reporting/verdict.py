"""Whether to use a model: sentences that follow from the numbers by fixed rules.

RULES says which; the page prints them. `Faster` and `slower` are the benchmark's verdicts: the 95 % interval of the
time ratio leaves out one. The limits are conventions, not measurements: 5 % is taken for a loss that a user accepts
without asking, 50 % for one that no speed is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moeify.benchmark.models.results import Interval, Outcome, Verdict
from moeify.reporting.facts import Facts, Likeness
from moeify.words import factor, fixed, listing, percent

Level = Literal["yes", "partly", "no", "unknown"]

SMALL_LOSS = 1.05
LARGE_LOSS = 1.5
# The same of models that write no text: share of classes, or cosine of features, that stay.
SMALL_CHANGE = 0.95
LARGE_CHANGE = 0.8
# Memory and disk differ when they differ by this share.
NOTABLE = 0.05
# Fields of Facts that hold regimes.
PHASES = ("decode", "prefill", "forward", "engine")
IN_TRANSFORMERS = PHASES[:-1]
# In their order; the first that applies gives the advice.
RULES = (
    "Quality or speed was not measured: no advice.",
    "Pruning to the same active size is certainly better, and mostly as fast or faster: do not use it.",
    f"Nothing gained (nowhere faster, neither memory nor disk at least {NOTABLE * 100:g} % smaller): do not use it.",
    f"Perplexity above {LARGE_LOSS:g} times the dense model's: not as it is.",
    f"The 95 % interval of the perplexity ratio ends at or below {SMALL_LOSS:g}: use it where it is not slower.",
    "Otherwise: only if the gain is worth the loss.",
    (
        "Of encoders the share of examples with the dense model's class counts, else the cosine of features: pruning "
        f"is better if its 95 % interval lies above; {LARGE_CHANGE:g} is the limit of rule 4, {SMALL_CHANGE:g} of 5."
    ),
)
CONVENTION = (
    "Pruning is the static control: by rule 2 the 95 % interval of the ratio of both perplexities, drawn from the same "
    "blocks of text, lies above one, and its time is no longer in at least half of the regimes that both were measured "
    "in. Faster and slower mean that the 95 % interval of the time ratio (in llama.cpp: every round) leaves out one, "
    "same that it ends near one; otherwise the run cannot tell. Each regime is the model's fastest implementation. "
    "Over several texts perplexities are pooled by tokens. The limits are conventions of this report, not measured."
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


def advise(facts: Facts) -> Advice:
    """The first rule that applies."""
    ratio = facts.ratio
    if facts.likeness is not None and facts.regimes:
        return _advise_encoder(facts, facts.likeness)
    if ratio is None or not facts.regimes:
        known = [f"{factor(row.over_dense)} ({row.type})" for row in facts.engine_files if row.over_dense]
        words = f" In llama.cpp its perplexity is {listing(known)} times the dense model's." if known else ""
        missing = "quality" if ratio is None and facts.likeness is None else "speed"
        return Advice("unknown", f"Its {missing} was not measured.{words}")
    if facts.control and facts.over_control and is_beaten(facts):
        control = f"plain pruning to the same active size ({facts.control.model.name}) loses less"
        both = ", and is mostly as fast or faster" * bool(facts.control.regimes)
        ratio_words = f"Perplexity is {fixed(facts.over_control.value, 3)} times its."
        return Advice("no", f"Do not use it: {control}{both}. {ratio_words}")
    faster = where(facts, "faster", PHASES)
    gain = "; ".join([f"faster for {faster}"] * bool(faster) + smaller(facts))
    if gain:
        return _weigh(ratio, gain, where(facts, "slower", PHASES))
    if ratio.low > 1:
        return Advice("no", f"Do not use it: {not_faster(facts)}, and {quality_words(ratio)}.")
    return Advice("no", f"No reason to use it: {not_faster(facts)}; {quality_words(ratio)}.")


def _advise_encoder(facts: Facts, likeness: Likeness) -> Advice:
    """The same rules, where the loss is what changed."""
    other = facts.control.likeness if facts.control else None
    if other is not None and other.low > likeness.high and not _is_slower(facts):
        return Advice("no", f"Do not use it: {pruned_words(facts)}, and it is mostly as fast or faster.")
    faster, slower = where(facts, "faster", PHASES), where(facts, "slower", PHASES)
    gain = "; ".join([f"faster for {faster}"] * bool(faster) + smaller(facts))
    loss = likeness_words(likeness)
    if not gain:
        return Advice("no", f"No reason to use it: {not_faster(facts)}; {loss}.")
    if likeness.value < LARGE_CHANGE:
        what = "Fine-tune it first (moeify finetune), or let more experts be active"
        return Advice("no", f"Not as it is: {gain}, but {loss}. {what}.")
    keep = f" Keep the dense model for {slower}." if slower else ""
    if likeness.value < SMALL_CHANGE:
        return Advice("partly", f"Only if the gain is worth the loss: {gain}, but {loss}.{keep}")
    return Advice("partly" if slower else "yes", f"Use it{' where it gains' if slower else ''}: {gain}; {loss}.{keep}")


def likeness_words(likeness: Likeness) -> str:
    """A clause about what stayed."""
    value = fixed(likeness.value, 3) if "cosine" in likeness.words else percent(likeness.value)
    return f"{value} {likeness.words}"


def pruned_words(facts: Facts) -> str:
    """A clause about the static control's likeness; empty without one."""
    other = facts.control.likeness if facts.control else None
    if facts.control is None or other is None:
        return ""
    return f"with plain pruning to the same active size ({facts.control.model.name}) {likeness_words(other)}"


def _weigh(ratio: Interval, gain: str, slower: str) -> Advice:
    """The gain against the loss, by rules 4 to 6."""
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
    over = facts.over_control
    if facts.control is None or over is None or over.low <= 1:
        return False
    return not _is_slower(facts)


def _is_slower(facts: Facts) -> bool:
    """Whether the static control takes longer in most regimes."""
    assert facts.control is not None
    times, others = _times(facts), _times(facts.control)
    both = times.keys() & others.keys()
    return 2 * sum(others[regime] <= times[regime] for regime in both) < len(both)


def control_words(facts: Facts) -> str:
    """The model against its static control; empty if they were not compared on the same blocks."""
    over = facts.over_control
    if over is None:
        return ""
    numbers = f"perplexity is {fixed(over.value, 3)} times its ({fixed(over.low, 3)} to {fixed(over.high, 3)})"
    if over.high < 1:
        closed = facts.gap_closed
        share = f", {percent(closed)} of the way to dense" if closed is not None and closed > 0 else ""
        return f"Better than plain pruning to the same active size: {numbers}{share}."
    how = "Worse" if over.low > 1 else "Not shown to be better"
    return f"{how} than plain pruning to the same active size: {numbers}."


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


def engine_words(facts: Facts) -> str:
    """What other engines make of it, in a sentence; empty if none was timed."""
    clauses = []
    for phase in dict.fromkeys(row.phase for row in facts.engine):
        ratios = [row.time_over_dense for row in facts.engine if row.phase == phase]
        ends = " to ".join(dict.fromkeys((factor(min(ratios)), factor(max(ratios)))))
        clauses.append(f"{phase} takes {ends}")
    files = listing(list(dict.fromkeys(row.implementation.split(",")[0] for row in facts.engine)))
    return f"In {files} {' and '.join(clauses)} of the dense model's time." if clauses else ""


def smaller(facts: Facts) -> list[str]:
    shares = (("memory", facts.memory), ("disk", facts.disk))
    return [f"{percent(1 - share)} less {what}" for what, share in shares if share and share < 1 - NOTABLE]


def not_faster(facts: Facts) -> str:
    return f"nowhere {'shown to be ' * bool(where(facts, 'cannot tell', PHASES))}faster than the dense model"


def where(facts: Facts, outcome: Outcome, phases: Sequence[str] = IN_TRANSFORMERS) -> str:
    """The regimes with an outcome: `decode at batch 1 and 4, and prefill everywhere`."""
    places = []
    for phase in phases:
        rows: tuple[Verdict, ...] = getattr(facts, phase)
        regimes = [regime for regime in rows if regime.outcome == outcome]
        if regimes and phase == "engine":
            places.append(_in_engine(regimes, rows))
        elif regimes:
            everywhere = len(regimes) == len(rows) > 1
            places.append(f"{phase} {'everywhere' if everywhere else _regimes(regimes, rows)}")
    return ", and ".join(places)


def _in_engine(regimes: Sequence[Verdict], of: Sequence[Verdict]) -> str:
    """`decode in llama.cpp`; where files or threads of a phase differ in their outcome, which ones."""
    mixed = {row.phase for row in of if row not in regimes}
    names = [f"{row.phase} ({row.implementation})" if row.phase in mixed else row.phase for row in regimes]
    return f"{listing(list(dict.fromkeys(names)))} in llama.cpp"


def _regimes(regimes: Sequence[Verdict], of: Sequence[Verdict]) -> str:
    """`at batch 1 and 4`, for each prompt length if the run has several."""
    several = len({regime.prompt_tokens for regime in of}) > 1
    groups = []
    for length in sorted({regime.prompt_tokens for regime in regimes}):
        batches = listing([regime.batch for regime in regimes if regime.prompt_tokens == length])
        groups.append(f"at batch {batches}" + (f" of {length:,} tokens" if several else ""))
    return ", ".join(groups)


def _times(facts: Facts) -> dict[tuple[str, str, int, int], float]:
    """By regime; in transformers each model's implementation is its own."""

    def place(row: Verdict) -> str:
        return row.implementation if row in facts.engine else ""

    return {(place(row), row.phase, row.batch, row.prompt_tokens): row.time_over_dense for row in facts.regimes}
