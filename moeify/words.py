"""How numbers, sizes, times, lists and names are written, and what words mean: for tables, sentences and the report."""

import math
import re
import unicodedata
from collections.abc import Sequence

# Decimal as disks and memory are sold, binary as drivers count.
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
# What tables, `moeify ls words` and the report say of a word.
DEFINITIONS = {
    "/dense": "time over the dense model's; less than 1 is faster",
    "/floor": "time over the least that this machine's bandwidth and arithmetic allow",
    "95 %": "interval in which the value lies with 95 %, by drawing blocks or questions again",
    "acc": "share of questions whose right choice is the likeliest; acc_norm: the likeliest a character",
    "active": "runs for a token; shared experts are active for every one",
    "dense": "not cut: every token uses all neurons",
    "energy": "squared norm of an FFN's output; kept is the share that the active experts give, before the refit",
    "exact": "with every expert on, the target computes the dense model's logits",
    "expert": "a slice as an FFN of its own, shared or routed",
    "feature cosine": "mean cosine of an example's features and the first model's; features are means over positions",
    "feature error": "mean of 1 - cosine of a position's last hidden state and the dense model's",
    "gain reached": "of what the oracle keeps more than static pruning, the share that the router keeps",
    "gap closed": "share of the way from static pruning with refit (0 %) to the dense model (100 %), in log-perplexity",
    "hit": "share of the experts that the batch used",
    "KL": "how far the next token's distribution is from the dense model's, in nats; 0 is equal",
    "load": "share of the tokens for which an expert is active; its entropy is 1 if all have the same",
    "oracle": "a choice that knows every expert's output; no router with as many experts does better",
    "over static": "perplexity over that of static pruning with refit at the same budget, from the same blocks of text",
    "perplexity": "exp of the mean loss of a token but the first of each block; its value depends on text and block",
    "pseudo-perplexity": "perplexity of masked tokens, one at a time, guessed from all others around them",
    "refit": "down_proj solved again in closed form, so that the active neurons alone come near the dense output",
    "routed": "runs only for the tokens for which the router chooses it",
    "router": "scores the routed experts of a layer for a token; those with the highest scores run",
    "shared": "always on, runs for every token",
    "slice": "an equal part of the neurons of an FFN",
    "static": "plain pruning: the same neurons for every token, the others dropped; what a split has to beat",
    "target perplexity": "perplexity of what was hidden in a text, as the decoder writes it: spans, or its second half",
    "to first": "difference to the first model's score on the same questions",
    "top 1": "share of positions where the likeliest next token is the dense model's",
    "word error rate": "words that were left out, added or taken for others, over the words that were said",
}
# Control, format, surrogate and unassigned characters, and separators of lines and paragraphs.
UNPRINTABLE = frozenset(("Cc", "Cf", "Cs", "Cn", "Zl", "Zp"))


def number(value: float) -> str:
    """Three significant digits, no exponent for what people read: 0.0123, 1.23, 12.3, 1,230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.1e}" if digits > 6 else f"{round(value, digits):,.{max(0, digits)}f}"


def fixed(value: float | None, digits: int) -> str:
    """So many digits behind the point, half as many from 100 on: columns of a table; empty for None."""
    return "" if value is None else f"{value:,.{digits if abs(value) < 100 else digits // 2}f}"


def between(low: float | None, high: float | None, digits: int) -> str:
    """The two ends of an interval: 1.18 1.22; empty without them."""
    return "" if low is None or high is None else f"{fixed(low, digits)} {fixed(high, digits)}"


def factor(value: float) -> str:
    """A ratio to two decimals; three significant digits where two decimals would say nothing."""
    return f"{value:,.2f}" if 0.1 <= value < 100 else number(value)


def percent(share: float) -> str:
    """0.694 is 69 %; below 10 % one decimal."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.0995 or share == 0 else f"{share * 100:.1f} %"


def count(value: float) -> str:
    """134,515,008 is 134.5 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:,.0f}"


def size(num_bytes: float) -> str:
    """Decimal units, as disks are sold."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{number(num_bytes / limit)} {unit}"
    return f"{num_bytes:.0f} B"


def parse_size(text: str) -> int:
    """Bytes of a text like 6GB, 5.8 GiB or 0, the inverse of `size`.

    Raises:
        ValueError: it is no size; the message says what was expected.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-z]{2,3})?", text.strip(), re.ASCII | re.IGNORECASE)
    number_text, unit = match.groups() if match else ("", None)
    if number_text and not unit and not float(number_text):
        return 0
    if not number_text or (unit or "").lower() not in UNITS:
        raise ValueError("expected a size with its unit, such as 6GB or 5.8GiB, or 0")
    return int(float(number_text) * UNITS[str(unit).lower()])


def duration(seconds: float) -> str:
    """In seconds up to two minutes, in minutes up to two hours."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:,.0f} h"


def listing(items: Sequence[object]) -> str:
    """1, 2 and 4."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"


def ranges(numbers: Sequence[int]) -> str:
    """Rising whole numbers: 0-3, 7."""
    parts: list[list[int]] = []
    for value in numbers:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts) or "none"


def explained(*names: str) -> str:
    """Those words with what they mean, a line each."""
    return "\n".join(f"{name}: {DEFINITIONS[name]}" for name in names)


def printable(text: object) -> str:
    """With control characters, and those that turn the direction of text, escaped: names in files may hold any."""
    return "".join(
        letter if letter == "\n" or unicodedata.category(letter) not in UNPRINTABLE else ascii(letter)[1:-1]
        for letter in str(text)
    )


def on_one_line(text: object) -> str:
    """The same, with line breaks escaped as well."""
    return printable(text).replace("\n", "\\n")
