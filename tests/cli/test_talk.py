"""`moeify generate` and `moeify chat`: what is read, what is shown, and how a conversation ends."""

import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moeify.cli import render
from moeify.cli.app import run_command
from moeify.cli.render import Renderer

FEW = ["--tokens", "6", "--quiet"]


class Input(io.StringIO):
    def __init__(self, text: str, *, terminal: bool = False) -> None:
        super().__init__(text)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_a_prompt_is_continued_and_the_models_stand_side_by_side(taught: Path, tmp_path: Path, capsys: Any) -> None:
    assert run_command(["generate", str(taught), "--prompt", "The class", "--tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert "moeify generate" in out
    assert err == ""
    other = shutil.copytree(taught, tmp_path / "other")
    assert run_command(["generate", str(taught), str(other), "--prompt", "The class", *FEW]) == 0
    _, first, second = re.split(r"^== .*\n", capsys.readouterr().out, flags=re.MULTILINE)
    assert first == second
    assert first.strip()


def test_json_is_one_object(taught: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(["generate", str(taught), "--prompt", "The class", "--tokens", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "moeify.generate/1"
    assert found["generations"][0]["num_tokens"] == 6
    monkeypatch.setattr(sys, "stdin", Input("The class\nThe object"))
    assert run_command(["chat", str(taught), "--tokens", "6", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "has no chat template: it continues" in err
    found = json.loads(out)
    assert [turn["prompt"] for turn in found["turns"]] == ["The class", "The object"]


def test_a_prompt_may_be_piped_in(taught: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_command(["generate", str(taught), "--prompt", "The class", *FEW]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", Input("The class\n"))
    assert run_command(["generate", str(taught), *FEW]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", Input("", terminal=True))
    assert run_command(["generate", str(taught), *FEW]) == 2
    assert "--prompt" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Input("x" * (1 << 23)))
    assert run_command(["generate", str(taught), *FEW]) == 3
    monkeypatch.setattr(sys, "stdin", None)
    assert run_command(["generate", str(taught), *FEW]) == 2


def test_without_a_number_of_tokens_as_many_are_made_as_fit(taught: Path, capsys: Any) -> None:
    assert run_command(["generate", str(taught), "--prompt", "The class", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["generations"]
    # The model takes 64.
    assert one["num_prompt_tokens"] + one["num_tokens"] == 64 or one["ended"]
    assert run_command(["generate", str(taught), "--prompt", "The class", "--tokens", "64", "--quiet"]) == 3
    assert "/new" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "answers"),
    [("one\ntw\xf6\n", 2), ("one\n/quit\ntwo\n", 1), ("\n \none\n/new\none", 2), ("", 0), ("/exit", 0)],
)
def test_a_piped_conversation(
    lines: str, answers: int, taught: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pipe, in which bytes may be no UTF-8.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode("latin-1"))))
    assert run_command(["chat", str(taught), "--tokens", "3", "--json"]) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert len(turns) == answers
    if "/new" in lines:
        assert turns[0]["generations"][0]["text"] == turns[1]["generations"][0]["text"]


def test_at_a_terminal_an_error_and_ctrl_c_end_an_answer_and_the_end_of_input_ends_all(
    taught: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Input("", terminal=True))
    said: list[str | type[BaseException]] = ["long " * 100, "stop", "one", EOFError, KeyboardInterrupt]

    def ask(self: Renderer, marker: str) -> str:
        word = said.pop(0)
        if isinstance(word, str):
            return word
        raise word

    shown: list[str] = []

    def text(self: Renderer, piece: str) -> None:
        shown.append(piece)
        if said and said[0] == "one":
            raise KeyboardInterrupt

    monkeypatch.setattr(render.Renderer, "ask", ask)
    monkeypatch.setattr(render.Renderer, "text", text)
    assert run_command(["chat", str(taught), *FEW]) == 0
    assert said == [KeyboardInterrupt]
    assert re.search(r"^error: .* are more than the 64", capsys.readouterr().err, re.MULTILINE)
    assert "".join(shown).strip()
    assert run_command(["chat", str(taught), *FEW]) == 0
    assert said == []


def test_of_control_characters_only_lines_and_tabs_are_shown(capsys: Any) -> None:
    Renderer().text("a\n\tb\x1b[2J\u202e\rc")
    assert capsys.readouterr().out == "a\n\tb\\x1b[2J\\u202e\\rc"


@pytest.mark.slow
def test_a_real_terminal_and_a_real_interrupt(taught: Path) -> None:
    """Typed at a terminal of its own; Ctrl-C at the prompt ends it with 0 and no traceback."""
    parent, child = pty.openpty()
    # A background job of a shell without job control, as in CI, inherits that SIGINT is ignored.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moeify.cli.app import main; sys.argv[1:] = ['chat', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", code, str(taught), "--tokens", "3"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    out = b""

    def until(sign: bytes) -> None:
        nonlocal out
        end = time.monotonic() + 120
        while sign not in out and time.monotonic() < end:
            out += os.read(parent, 4096)
        assert sign in out, out

    until(b"> ")
    os.write(parent, b"one\n")
    out = b""
    until(b"\r\n> ")
    try:
        # Between the prompt and readline's wait for a key a signal is lost until the next: press again, as one would.
        for _ in range(12):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
                break
        assert process.poll() == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    assert b"Traceback" not in out
