"""What `moeify chat` and `moeify generate` read from stdin, and how they show the words of several models."""

import io
import sys
from collections.abc import Sequence

from moeify.check.generate import Conversation, GenerateResult, Generation, Speaker
from moeify.cli.render import Renderer
from moeify.errors import InputError, MoeifyError, UsageError, warn
from moeify.models.device import find_device
from moeify.options import GenerateOptions

# More is no prompt that a model takes.
LIMIT_CHARACTERS = 1 << 22
QUIT, NEW = ("/quit", "/exit"), "/new"


class Parts:
    """Shows pieces of text, with the name of a model before its first where there are several."""

    def __init__(self, renderer: Renderer, *, many: bool) -> None:
        self._renderer, self._many = renderer, many
        self._model: str | None = None
        self._at_start = True

    def show(self, model: str, piece: str) -> None:
        if model != self._model:
            self.end()
            self._model = model
            if self._many:
                self._renderer.text(f"== {model}\n")
        self._renderer.text(piece)
        self._at_start = piece.endswith("\n")

    def end(self) -> None:
        """End the line that the last piece left open."""
        if not self._at_start:
            self._renderer.text("\n")
        self._model, self._at_start = None, True


def read_prompt() -> str:
    """All of stdin.

    Raises:
        UsageError: it is a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("there is no prompt", "give one with --prompt, or pipe it in")
    text = _stdin().read(LIMIT_CHARACTERS + 1)
    _check_length(text)
    return text.removesuffix("\n")


def talk(
    renderer: Renderer, models: Sequence[str], options: GenerateOptions, system: str | None
) -> list[GenerateResult]:
    """Answer line after line of stdin with every model, until it ends.

    At a terminal an error or Ctrl-C ends an answer, not the conversation; Ctrl-C at the prompt ends that as well.
    """
    find_device(options.device)
    speakers = [Speaker.open(name, options, renderer.track) for name in models]
    for speaker in speakers:
        if not speaker.has_template:
            warn(f"{speaker.name} has no chat template: it continues the text of the conversation")
    first = [{"role": "system", "content": system}] if system else []
    conversations = [Conversation(speaker, list(first)) for speaker in speakers]
    stdin = _stdin()
    interactive, turns = stdin.isatty(), list[GenerateResult]()
    while (line := _next_line(renderer, stdin, interactive=interactive)) is not None:
        if line.strip() in QUIT:
            break
        if line.strip() == NEW:
            conversations = [Conversation(speaker, list(first)) for speaker in speakers]
        elif line.strip():
            turns.append(GenerateResult(line, _answers(renderer, conversations, line, interactive=interactive)))
    return turns


def _answers(
    renderer: Renderer, conversations: Sequence[Conversation], line: str, *, interactive: bool
) -> tuple[Generation, ...]:
    parts, made = Parts(renderer, many=len(conversations) > 1), []
    try:
        for one in conversations:
            made.append(one.answer(line, lambda piece, name=one.speaker.name: parts.show(name, piece)))  # type: ignore[misc]
    except (MoeifyError, KeyboardInterrupt) as error:
        parts.end()
        if not interactive:
            raise
        if isinstance(error, MoeifyError):
            renderer.error(error)
    parts.end()
    return tuple(made)


def _next_line(renderer: Renderer, stdin: io.TextIOBase, *, interactive: bool) -> str | None:
    """A line without its end; None at the end of stdin, and at Ctrl-C of whoever sits there."""
    if not interactive:
        line = stdin.readline(LIMIT_CHARACTERS + 1)
        _check_length(line)
        return line.removesuffix("\n") if line else None
    try:
        return renderer.ask("> ")
    except (EOFError, KeyboardInterrupt):
        renderer.text("\n")
        return None


def _stdin() -> io.TextIOBase:
    """stdin, whose bytes are UTF-8 or replaced; to be called once, before anything is read."""
    if sys.stdin is None:
        return io.StringIO()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return sys.stdin  # type: ignore[return-value]


def _check_length(text: str) -> None:
    if len(text) > LIMIT_CHARACTERS:
        raise InputError(f"a prompt of more than {LIMIT_CHARACTERS:,} characters", "no model takes so many")
