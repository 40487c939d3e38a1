"""Numbers as a reader wants them: three significant digits, a unit, a list in words."""

import math
from collections.abc import Sequence

# What stands for characters that cannot be seen; the last two blanks keep a token from looking empty.
VISIBLE = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d", "\u00a0": "\u237d"}


def count(number: float) -> str:
    """134,515,008 is 134.5 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Decimal units, as disks are sold."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{number(num_bytes / limit)} {unit}"
    return f"{num_bytes:.0f} B"


def number(value: float) -> str:
    """Three significant digits, no exponent for what people read: 0.0123, 1.23, 12.3, 1,230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    if digits > 6:
        return f"{value:.1e}"
    return f"{round(value, digits):,.{max(0, digits)}f}"


def factor(value: float) -> str:
    """A ratio to two decimals; three significant digits where two decimals would say nothing."""
    return f"{value:,.2f}" if 0.1 <= value < 100 else number(value)


def percent(share: float) -> str:
    """0.694 is 69 %; below 10 % one decimal."""
    return f"{share:.0%}".replace("%", " %") if share >= 0.0995 or share == 0 else f"{share * 100:.1f} %"


def listing(items: Sequence[object]) -> str:
    """1, 2 and 4."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"


def token(text: str) -> str:
    """A token's text with its blanks visible; control characters and halves of a code point become U+FFFD."""
    shown = "".join(VISIBLE.get(letter, letter) for letter in text)
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in shown) or "\u2205"
