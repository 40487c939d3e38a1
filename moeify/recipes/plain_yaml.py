"""YAML without its traps: plain values alone, small and shallow, every key once, no aliases, no tags.

A few lines of YAML with aliases stand for more values than any memory holds, tags have constructors that fail in ways
of their own, and of a key that is written twice one value is lost without a word.
"""

from typing import Any, cast

import yaml
from yaml.error import Mark
from yaml.events import AliasEvent, CollectionStartEvent, Event, ScalarEvent
from yaml.nodes import MappingNode, Node, ScalarNode

from moeify.errors import InputError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """Refuses while it reads, before any value is made."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, AliasEvent):
            raise _refusal("an alias", event)
        if isinstance(event, (ScalarEvent, CollectionStartEvent)) and event.tag is not None:
            raise _refusal(f"the tag {event.tag:.60}", event)
        if self.depth == MAX_DEPTH:
            raise _refusal(f"more than {MAX_DEPTH} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise _refusal("a key that is no word", key)
            if key.value in seen:
                raise _refusal(f"the key {key.value!r:.60} twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refusal(what: str, place: Event | Node) -> yaml.MarkedYAMLError:
    # Read by Python, not by libyaml, whose marks are of another class.
    return yaml.MarkedYAMLError(problem=what, problem_mark=cast(Mark, place.start_mark))


def load_yaml(data: bytes, name: str) -> Any:
    """The value of a YAML text.

    Args:
        data: its bytes, UTF-8.
        name: of the text, for errors.

    Raises:
        InputError: it is not YAML, or YAML with more than plain values.
    """
    hint = f"a recipe is YAML in UTF-8 of plain values, without aliases and tags, {MAX_DEPTH} levels deep at most"
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} has {len(data):,} bytes, expected {MAX_BYTES:,} at most", hint)
    try:
        return yaml.load(data.decode("utf-8-sig"), _Loader)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{name} is not YAML that a recipe may hold{place}: {error.problem}", hint) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: half a character, a number of 5,000 digits, the 99th of February.
        raise InputError(f"{name} is not YAML that a recipe may hold: {error}", hint) from error
