"""Whether two tokenizers do the same: on texts that are known to tell tokenizers apart, and in what they have."""

from collections.abc import Iterator
from typing import Any

from moeify.words import printable

# Each alone: what is first or last in a text is often cut in its own way.
PIECES = (
    "The quick brown fox jumps over the lazy dog.",
    " a leading space",
    "a trailing space ",
    "two  spaces,   three,     five",
    "a line\nanother\n\n\nand one after three\r\nand of Windows\r\n",
    "\n",
    "\n\n  \n",
    "\ttabs\t\tand spaces \t ",
    "7 12 345 6789 12345 678901 3.14159 1,234,567.89 0x1F 2024-12-31",
    "I'm you're WE'LL they'd IT'S don't",
    "def f(x: int) -> str:\n    if x != 0:\n        return f'{x:>8}'\n\n\n# end\n",
    "https://example.org/a_b?c=d&e=%20#f <b>x</b> {\"k\": [1, null]} a--b ... !!! $5 50% @me #1",
    "\u00e9 e\u0301 \u00e4\u00f6\u00fc\u00df na\u00efve \u0130I\u0131i \u1e9e",
    "\u4e2d\u6587\u5206\u8bcd \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f600\U0001f469\u200d\U0001f4bb \u2764\ufe0f \u00a0\u2003\u200b \u2581 \ufb01 \uff21\uff11 \u00bd \u2460",
    "UPPER lower MiXeD CamelCase snake_case kebab-case",
    "",
)  # fmt: skip
# Of a special token, so many are put into a text.
SPECIAL_TOKENS = 16
# Tokens of a difference that are named.
SHOWN = 5


def token_difference(found: Any, expected: Any) -> str:
    """The first thing in which a tokenizer differs from the one it should be like, or "".

    Args:
        found: the tokenizer.
        expected: what it is compared with.
    """
    for text in probe_texts(expected):
        if difference := _on(text, found, expected):
            return difference
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "all_special_ids"):
        if getattr(found, name) != getattr(expected, name):
            return f"its {name} is {getattr(found, name)} instead of {getattr(expected, name)}"
    if found.chat_template != expected.chat_template:
        return "its chat template is another"
    ours, theirs = found.get_vocab().items(), expected.get_vocab().items()
    others = sorted(ours ^ theirs)
    return f"it has {len(ours):,} tokens, expected {len(theirs):,}: {_short(others[0][0])} differs" if others else ""


def probe_texts(tokenizer: Any) -> Iterator[str]:
    """Every text that is compared: the pieces, all of them as one, and special tokens inside a text.

    A chat template is compared as it is written, not run: a hostile one may take forever.
    """
    yield from PIECES
    yield "\n".join(PIECES)
    special = [str(token) for token in tokenizer.all_special_tokens][:SPECIAL_TOKENS]
    yield from (f"before {token} after{token}{token}\nend" for token in special)


def _on(text: str, found: Any, expected: Any) -> str:
    ids: list[int] = []
    for special in (False, True):
        ids, right = (
            list(one(text, add_special_tokens=special, verbose=False)["input_ids"]) for one in (found, expected)
        )
        if ids != right:
            pairs = enumerate(zip(ids, right, strict=False))
            place = next((i for i, (one, other) in pairs if one != other), min(len(ids), len(right)))
            near = slice(max(0, place - 1), place + SHOWN)
            cut, rightly = found.convert_ids_to_tokens(ids)[near], expected.convert_ids_to_tokens(right)[near]
            return f"it cuts {_short(text)} into {_short(cut)} instead of {_short(rightly)}, at token {place:,}"
    if found.decode(ids) != expected.decode(ids):
        return f"it reads the tokens of {_short(text)} back as {_short(found.decode(ids))}"
    return ""


def _short(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
