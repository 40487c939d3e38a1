"""The chat template of a tokenizer, rendered in jinja's sandbox as transformers does it, in bounded time and length.

A template comes from the model's folder. It sees the messages and nothing of the machine; one that never ends, or that
takes no conversation, is an InputError.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeify.errors import InputError, first_line, warn

Message = Mapping[str, str]
# Of a rendered conversation.
LIMIT_CHARACTERS = 1 << 22
LIMIT_SECONDS = 20.0
# What stands in a rendered conversation where the words of both sides go; no template and no tokenizer alters it.
QUESTION, ANSWER, NEXT = "moeifyquestion", "moeifyanswer", "moeifynext"
WITHOUT = "`moeify generate` continues a text without a template"
# A template that writes the date writes this one, so that one seed means one text; hybrid models answer at once.
FIXED = {"date_string": "26 Jul 2024", "enable_thinking": False}


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def conversation(tokenizer: Any, messages: Sequence[Message], name: str, **values: Any) -> str:
    """The text of a conversation, up to where the next answer begins.

    Args:
        tokenizer: with a template.
        messages: `role` and `content` of each.
        name: of the model, for errors.
        values: that the template may read.

    Raises:
        InputError: the template does not take it, or does not end.
    """
    text: list[str] = []
    fault: list[str] = []

    def render() -> None:
        try:
            prompt = messages[-1]["role"] == "user"
            text.append(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages], add_generation_prompt=prompt, tokenize=False, **values
                )
            )
        except Exception as error:
            # Templates raise what they like.
            fault.append(first_line(error))

    # Nothing else stops a template; the thread ends with the process.
    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(LIMIT_SECONDS)
    if thread.is_alive():
        raise InputError(f"the chat template of {name} does not end within {LIMIT_SECONDS:.0f} seconds", WITHOUT)
    if fault:
        raise InputError(f"the chat template of {name} does not take this conversation: {fault[0]}", WITHOUT)
    if len(text[0]) > LIMIT_CHARACTERS:
        raise InputError(f"the chat template of {name} makes {len(text[0]):,} characters", "begin anew")
    return text[0]


def conversation_ids(tokenizer: Any, messages: Sequence[Message], name: str, **values: Any) -> list[int]:
    """Tokens of a conversation.

    Raises:
        InputError: see `conversation`.
    """
    text = conversation(tokenizer, messages, name, **values)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@dataclass(frozen=True)
class Turns:
    """The tokens that a chat template puts around questions and answers.

    Args:
        opening: before the first question.
        answer: between a question and its answer; its first token ends the question.
        next: between an answer and the next question; its first token ends the answer.
    """

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    next: tuple[int, ...]


def chat_turns(tokenizer: Any, name: str) -> Turns | None:
    """The turns of a model for chats; None without a template, and with a warning for one that shows no turns."""
    if not has_template(tokenizer):
        return None
    try:
        return turns_of(tokenizer, name)
    except InputError as error:
        warn(f"{error}; the model's own text is written without it")
        return None


def turns_of(tokenizer: Any, name: str) -> Turns:
    """Read from a template how a conversation goes on.

    Args:
        tokenizer: with a template.
        name: of the model, for errors.

    Raises:
        InputError: the template takes no conversation, or marks the end of a question or an answer by no token of its
            own, so that nobody can say where a model ends one.
    """
    said = [{"role": "user", "content": QUESTION}]
    first = _pieces(tokenizer, conversation(tokenizer, said, name, **FIXED), (QUESTION,), name)
    said += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": NEXT}]
    whole = _pieces(tokenizer, conversation(tokenizer, said, name, **FIXED), (QUESTION, ANSWER, NEXT), name)
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for what, piece in (("question", first[1]), ("answer", whole[2])):
        if not piece or piece[0] not in marks:
            raise InputError(
                f"the chat template of {name} marks the end of each {what} by no token of its own", WITHOUT
            )
    return Turns(first[0], first[1], whole[2])


def _pieces(tokenizer: Any, text: str, words: Sequence[str], name: str) -> list[tuple[int, ...]]:
    """The tokens before, between and after words of a text; a token that has a part of a word is the word's."""
    places = [(text.find(word), text.find(word) + len(word)) for word in words]
    if any(text.count(word) != 1 for word in words) or places != sorted(places):
        raise InputError(f"the chat template of {name} does not repeat the messages one after the other", WITHOUT)
    try:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise InputError(f"the tokenizer of {name} does not say which characters a token has", WITHOUT) from error
    pieces: list[tuple[int, ...]] = []
    edges = [0, *(edge for place in places for edge in place), len(text)]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        inside = [start <= begin and end <= stop for begin, end in encoded["offset_mapping"]]
        pieces.append(tuple(token for token, good in zip(encoded["input_ids"], inside, strict=True) if good))
    return pieces
