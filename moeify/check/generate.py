"""Text that models make, each from the same prompt: token by token, to whoever wants to see it grow.

What a folder says of generation is not followed but for its end tokens: all models draw in the same way. A chat
template of a folder is rendered by models/chat.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from moeify.check.evaluate import load
from moeify.command_line import names_of
from moeify.errors import InputError
from moeify.models.chat import Message, conversation_ids, has_template
from moeify.models.config import load_config
from moeify.models.device import find_device
from moeify.models.files import locate
from moeify.models.generation import ends_of
from moeify.models.heads import check_language_model
from moeify.models.tokenizer import load_tokenizer
from moeify.options import GenerateOptions, Names, Track, untracked
from moeify.progress import shown
from moeify.readable import Readable

# At most so many, where nobody says how many.
NEW_TOKENS = 256
# Takes a piece of text as soon as it is certain.
Show = Callable[[str], None]


def unseen(_: str) -> None:
    """For text that nobody wants to see grow."""


@dataclass(frozen=True)
class Generation:
    """What one model made.

    Args:
        model: its name.
        text: without the prompt and without special tokens.
        num_prompt_tokens, num_tokens: read, and made.
        first_token_ms: until the first new token; the prompt is read in it.
        tokens_per_second: new tokens after the first.
        ended: the model said so itself, before its tokens were used up.
    """

    model: str
    text: str
    num_prompt_tokens: int
    num_tokens: int
    first_token_ms: float
    tokens_per_second: float
    ended: bool


@dataclass(frozen=True, repr=False)
class GenerateResult(Readable):
    """One prompt, and what every model made of it."""

    prompt: str
    generations: tuple[Generation, ...]


@dataclass(frozen=True, repr=False)
class ChatResult(Readable):
    """A conversation, prompt by prompt."""

    turns: tuple[GenerateResult, ...]


@dataclass(frozen=True)
class Speaker:
    """A model that is loaded, and how it makes text."""

    name: str
    model: Any
    tokenizer: Any
    options: GenerateOptions

    @classmethod
    def open(cls, name: str, options: GenerateOptions, track: Track[Any] = untracked) -> "Speaker":
        """Load a model and its tokenizer.

        Raises:
            InputError: one of them cannot be read.
        """
        path = locate(name, track)
        check_language_model(load_config(path), "writing text")
        tokenizer = load_tokenizer(path)
        return cls.of(name, load(name, dtype=options.dtype, device=options.device), tokenizer, options)

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any, options: GenerateOptions) -> "Speaker":
        """The same of what is loaded already; the model's own generation settings are replaced."""
        ends = ends_of(model, tokenizer)
        # transformers fills what is open in a call from here; caches, penalties and beams of a folder are not taken.
        model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0))
        return cls(name, model, tokenizer, options)

    @property
    def has_template(self) -> bool:
        return has_template(self.tokenizer)

    def text_ids(self, text: str) -> list[int]:
        """Tokens of a text that shall be continued."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation; the text of all messages where the model has no template for one.

        Raises:
            InputError: the template does not take it.
        """
        if not self.has_template:
            return self.text_ids("".join(message["content"] for message in messages))
        return conversation_ids(self.tokenizer, messages, self.name)

    def say(self, ids: Sequence[int], show: Show = unseen) -> Generation:
        """Continue the tokens; Ctrl-C passes through, and what was shown by then stays shown.

        Raises:
            InputError: there are no tokens, they do not fit into the model, or it computes no numbers.
        """
        num_new = self._num_new(len(ids))
        stream = _Stream(self.tokenizer, show)
        sampled = self.options.temperature > 0
        began = time.perf_counter()
        with torch.random.fork_rng(), _computing(self.name):
            torch.manual_seed(self.options.seed)
            ids_1T = torch.tensor([list(ids)], device=self.model.device)
            made_1T: Tensor = self.model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                streamer=stream,
                generation_config=GenerationConfig(
                    max_new_tokens=num_new,
                    do_sample=sampled,
                    # The distribution as it is: no cut at 50 tokens, which is transformers' default.
                    **({"temperature": self.options.temperature, "top_k": 0} if sampled else {}),
                ),
            )
        seconds, new = time.perf_counter() - began, made_1T[0, len(ids) :].tolist()
        first = (stream.first or time.perf_counter()) - began
        return Generation(
            model=self.name,
            text="".join(stream.pieces),
            num_prompt_tokens=len(ids),
            num_tokens=len(new),
            first_token_ms=first * 1000,
            tokens_per_second=(len(new) - 1) / (seconds - first) if len(new) > 1 else 0.0,
            ended=bool(new) and new[-1] in ends_of(self.model),
        )

    def _num_new(self, num_prompt: int) -> int:
        """At most so many tokens are made: as many as were asked for, or as fit."""
        if not num_prompt:
            raise InputError(f"the prompt has no tokens for {self.name}", "write a word")
        wanted, room = self.options.tokens or NEW_TOKENS, getattr(self.model.config, "max_position_embeddings", None)
        if not isinstance(room, int) or num_prompt + wanted <= room:
            return wanted
        if self.options.tokens is None and num_prompt < room:
            return room - num_prompt
        raise InputError(
            f"{num_prompt:,} tokens of the prompt and {self.options.tokens or 1:,} new ones are more than the {room:,} "
            f"that {self.name} takes",
            "ask for fewer with --tokens, shorten the prompt, or in a chat begin anew with /new",
        )


@dataclass
class Conversation:
    """What was said to one model, and what it answered."""

    speaker: Speaker
    messages: list[Message] = field(default_factory=list)

    def answer(self, prompt: str, show: Show = unseen) -> Generation:
        """The model's answer to everything said so far and the prompt; both are remembered.

        An error leaves the conversation as it was. So does Ctrl-C, but that a part of the answer was shown.

        Raises:
            InputError: see `Speaker`.
        """
        messages = [*self.messages, {"role": "user", "content": prompt}]
        generation = self.speaker.say(self.speaker.chat_ids(messages), show)
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        return generation


def generate(
    models: Names,
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    chat: bool = False,
    show: Callable[[str, str], None] | None = None,
    track: Track[Any] = shown,
    **choices: Any,
) -> GenerateResult:
    """Continue a prompt with one model after another; one is in memory at a time.

    Args:
        models: folders, hub ids, .gguf files or `builtin`, dense or converted.
        prompt: the text.
        options: how much, and whether it is drawn.
        chat: the prompt is a message to the model, in its own chat template.
        show: told the model and every piece of its text.
        track: shows the progress of making the embedded model.
        choices: single options by name, in place of those in `options`.

    Raises:
        InputError: a model cannot be read, or does not take the prompt.

    Example:
        result = moeify.generate(["builtin", "my-moe"], "The module", tokens=16)
        print([one.text for one in result.generations])
    """
    models, options = names_of(models), GenerateOptions.chosen(options, choices)
    find_device(options.device)
    # A name that is wrong is said before the first model speaks.
    for name in models:
        locate(name, track)
    generations = []
    for name in models:
        speaker = Speaker.open(name, options, track)

        def piece(text: str, name: str = name) -> None:
            if show is not None:
                show(name, text)

        if chat and not speaker.has_template:
            raise InputError(f"{name} has no chat template", "leave --chat out: the prompt is then continued")
        said = [{"role": "user", "content": prompt}]
        generations.append(speaker.say(speaker.chat_ids(said) if chat else speaker.text_ids(prompt), piece))
        del speaker
    return GenerateResult(prompt, tuple(generations))


class _Stream(TextStreamer):
    """Hands text on word by word, because the letters of the last one may still change."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.pieces = show, list[str]()
        self.first = 0.0

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt and not self.first:
            self.first = time.perf_counter()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        self.pieces.append(text)
        if text:
            self.show(text)


@contextmanager
def _computing(name: str) -> Iterator[None]:
    """Say what drawing from a distribution of NaN means; nothing else of torch is caught."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise InputError(
            f"{name} computes infinity or NaN from this prompt", "--dtype float32 reaches further"
        ) from error
