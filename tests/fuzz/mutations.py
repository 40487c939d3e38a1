"""Random changes of files: of values somewhere in a JSON document, and of bytes anywhere."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "..", "/etc/passwd", "default", "float32", "__class__", "x" * 300, "\x1b[2J", "1", "-1"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**16, 2**31, 2**63, 10**12, -(10**12), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=6,
)


@st.composite
def changed_json(draw: st.DrawFn, document: Any, names: Sequence[str] = ()) -> bytes:
    """A JSON document in which one to three values were replaced, moved, removed or added.

    Args:
        document: what is changed.
        names: of keys to add, beside random ones.
    """
    keys = st.one_of(TEXTS, st.sampled_from(names)) if names else TEXTS
    whole = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(whole))
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["value", "value", "number", "move", "remove", "add", "add"]))
        if kind == "move":
            other, name = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other[name])
        elif kind == "remove" and holder is not whole:
            del holder[key]
        elif kind == "add" and any(isinstance(other[name], dict) for other, name in places):
            holder, key = draw(st.sampled_from([place for place in places if isinstance(place[0][place[1]], dict)]))
            holder[key][draw(keys)] = draw(VALUES)
        elif kind == "number":
            holder[key] = draw(NUMBERS)
        else:
            holder[key] = draw(VALUES)
    return json.dumps(whole[0]).encode()


def _places(value: Any) -> Any:
    """Every container of a document with a key in it, outer ones first."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    # Long lists and mappings, such as vocabularies, count by their ends.
    for key in [*keys][:30] + [*keys][30:][-5:]:
        yield value, key
        yield from _places(value[key])


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some were replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([0, 1, 1, 4, 64, len(content)]))
        content = content[:start] + draw(st.binary(max_size=8)) + content[start + length :]
    return content
