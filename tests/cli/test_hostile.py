"""Options of any value and names of any letters: exit code 2 or 3, never a bug, and nothing raw on the terminal."""

import io
import logging
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense
from rich.table import Table

from moeify import plugin_list
from moeify.cli import render
from moeify.cli.app import run_command
from moeify.cli.options import Output, beside
from moeify.cli.render import PlainConsole, Renderer, renderer_for, traceback_of
from moeify.cli.tables.words import key_value_table
from moeify.errors import InputError, UsageError, warn

LONG, HUGE, LARGE = "a" * 5000, "9" * 30, "99999999999"
# Terminal escapes, markup and emoji codes of rich, a line that looks like one of ours, letters that turn text round.
PLAIN = ["a[/b]", "[red]x[bold]", ":smile:", "[link=file:///x]y", "\\[x]"]
NAMES = [*PLAIN, "x\x1b]0;T\x07\x1b[2J", "a\nerror: no", "a\u202eb", "\x9b31m", "\udc80", "a\rb"]
RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

COMMANDS = {
    "split": ["split", "MODEL", "--tokens", "1024", "-o", "out"],
    "search": ["search", "MODEL", "--tokens", "1024"],
    "compare": ["compare", "MODEL", "--tokens", "1024"],
    "eval": ["eval", "MODEL"],
    "verify": ["verify", "MODEL", "--dense", "MODEL"],
    "generate": ["generate", "MODEL", "--prompt", "x"],
    "bench": ["bench", "MODEL", "--against", "MODEL", "--skip", "memory"],
    "bench-layer": ["bench-layer", "--limit-seconds", "0"],
    "finetune": ["finetune", "MODEL", "--teacher", "MODEL", "--tokens", "1024"],
    "run": ["run", "ci-smoke"],
    "report": ["report", "."],
}
NUMBERS = {
    "split": {
        "--experts": ("nan", "0", "-1", LARGE, HUGE, "1e3"),
        "--tokens": ("1e30", "0", "-5", HUGE),
        "--budget": ("nan", "inf", "-1", "0", "1", "2"),
        "--temperature": ("nan", "inf", "-inf", "0", "-1", "1e-320", "1e308"),
        "--seed": ("-1", HUGE, "nan"),
        "--context": ("0", "-1", LARGE),
        "--shared": ("-1", LARGE),
        "--active": ("0", LARGE),
        "--dense-layers": (HUGE, "-1", "1.5", "9", "x"),
    },
    "search": {"--budget": ("nan", "1e400", "0"), "--trials": ("-1", HUGE)},
    "compare": {"--budget": ("nan", "x", "1e-300"), "--data-tokens": (HUGE, "0")},
    "eval": {"--tokens": (HUGE, "1e3", "0"), "--stride": ("0", HUGE), "--context": ("1", LARGE)},
    "verify": {"--tolerance": ("nan", "-1")},
    "generate": {"--tokens": ("0", HUGE, LARGE), "--temperature": ("nan", "inf", "-1", "1e-300", "1e9")},
    "bench": {
        "--threshold": ("nan", "inf", "-1"),
        "--batch": (HUGE, "0", "x"),
        "--prompt": (LARGE,),
        "--seconds-per-row": ("nan", "inf"),
        "--context": ("-1", "0"),
    },
    "bench-layer": {
        "--cases": ("0x0-0/0", "9999999999999x8-8/2", "64x256-0/0", "64x256-7/9", "64x256-8/8+8", "x"),
        "--tokens": (HUGE, "0"),
        "--limit-seconds": ("nan",),
    },
    "finetune": {
        "--learning-rate": ("nan", "inf", "0"),
        "--epochs": (HUGE,),
        "--batch": (HUGE, "0"),
        "--lora-rank": (HUGE,),
        "--warmup": ("nan", "1"),
        "--kl": ("nan",),
        "--router-rate": ("inf",),
        "--patience": (HUGE,),
    },
}
TEXTS = {
    "split": ("--partition", "--router", "--target", "--calibration", "--device", "--dtype", "--plan", "-o"),
    "search": ("--strategy", "-o"),
    "compare": ("--method", "--searched", "--data"),
    "eval": ("--data", "--device"),
    "generate": ("--device", "--dtype"),
    "bench": ("--baseline", "--data", "--device", "-o"),
    "bench-layer": ("--peers", "--cases", "--device"),
    "finetune": ("--stage", "--data", "--device", "--precision"),
    "run": ("--set",),
}
# In the place of a text: nothing, what no path has, what no system takes, what is there and is no such thing.
TEXT_VALUES = ["", "a\0b", LONG, "/", "\x1b[2J", "\udc80"]
CASES = [
    *((command, flag, value) for command in NUMBERS for flag, values in NUMBERS[command].items() for value in values),
    *((command, flag, value) for command, flags in TEXTS.items() for flag in flags for value in TEXT_VALUES),
]
# These may be: folders of text, and a name of a folder that is made.
ALLOWED = [("--calibration", "/"), ("--data", "/"), ("-o", "\x1b[2J")]
CASES = [case for case in CASES if case[1:] not in ALLOWED]

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> str:
    return str(make_dense("llama", intermediate_size=128, max_position_embeddings=64))


@pytest.fixture
def refused(dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """refused(*words) -> what is said; nothing is written."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> str:
        code = run_command([word if word != "MODEL" else dense for word in words])
        out, err = capfd.readouterr()
        assert code in (2, 3), (code, err)
        assert out == ""
        assert "a bug in moeify" not in err
        assert "Traceback" not in err
        assert not RAW.search(err), ascii(err)
        assert len(err) < 8000
        assert list(tmp_path.iterdir()) == []
        return err

    return call


@pytest.mark.parametrize(("command", "flag", "value"), CASES, ids=[" ".join(case)[:40] for case in CASES])
def test_a_hostile_value(refused: Refused, command: str, flag: str, value: str) -> None:
    refused(*COMMANDS[command], flag, value)


@pytest.mark.parametrize("value", ["", "a\0b", LONG, "/", "/dev/null", "\udc80", "a/b/c/d"], ids=ascii)
@pytest.mark.parametrize("command", ["inspect", "split", "eval", "chat", "report", "run", "ls", "schema", "tune"])
def test_a_hostile_argument(refused: Refused, command: str, value: str) -> None:
    refused(command, value)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_usage_errors_show_no_raw_letters(refused: Refused, name: str) -> None:
    for words in ([name], ["split", f"--{name}"], ["split", "m", "--dtype", name], ["ls", name]):
        refused(*words)
    refused("inspect", f"./{name}")


def test_nothing_behind_an_option_names_it(refused: Refused) -> None:
    """An empty variable of a script is not the folder that one is in."""
    assert "-o is empty" in refused("split", "MODEL", "-o", "")
    assert "--out= is empty" in refused("split", "MODEL", "--out=")


def console_on(out: io.StringIO, *, terminal: bool) -> PlainConsole:
    """As wide as it takes."""
    console = PlainConsole()
    console.file, console.width = out, 500
    console._force_terminal = console.is_interactive = terminal
    return console


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_plain_text_everywhere_in_a_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    out, renderer = io.StringIO(), Renderer()
    monkeypatch.setattr(renderer, "_out", console_on(out, terminal=False))
    renderer.result(None, table, key_value_table(name, [(name, name)]), next_step=name)
    text = out.getvalue()
    assert not RAW.search(text)
    if name in PLAIN:
        assert text.count(name) == 8


@pytest.mark.parametrize("terminal", [False, True])
def test_labels_of_progress_are_plain_text(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    err, renderer = io.StringIO(), Renderer()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(render, "PATIENCE_S", 0.0)
    monkeypatch.setattr(render, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(renderer, "_err", console_on(err, terminal=terminal))
    for _ in renderer.track(range(3), "a[/b]:smile:\x07\nx", 3):
        # The bar is drawn ten times a second.
        time.sleep(0.15 if terminal else 0)
    assert "a[/b]:smile:\\x07\\nx" in err.getvalue()
    assert "\x07" not in err.getvalue()


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_errors_warnings_and_tracebacks(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    Renderer().error(InputError(f"no {name}", f"not {name}"))
    Renderer().warning(name)
    assert len(capfd.readouterr().err.splitlines()) == 3
    traceback_of(InputError(name, "none"))
    err = capfd.readouterr().err
    assert err.startswith("Traceback") or "InputError" in err
    assert not RAW.search(err)


def test_lines_of_libraries_are_printable(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def listing(_: str) -> Any:
        warnings.simplefilter("always")
        warnings.warn("library \x1b[2J", UserWarning, stacklevel=1)
        warn("ours \x1b[2J")
        raise UsageError("end", "none")

    monkeypatch.setattr(plugin_list, "listing", listing)
    assert run_command(["ls", "targets"]) == 2
    err = capfd.readouterr().err
    assert all(f"{who} \\x1b[2J" in err for who in ("library", "ours"))
    assert not RAW.search(err)
    renderer_for(Output(verbose=True))
    record = logging.LogRecord("transformers", logging.ERROR, "", 0, "logged %s", ("\x1b[2J",), None)
    assert {handler.format(record) for handler in logging.getLogger("transformers").handlers} == {"logged \\x1b[2J"}


@pytest.mark.parametrize(("model", "folder"), [("a/b", "b-moe"), ("a/b/", "b-moe"), ("..", None), (".", None)])
def test_where_a_result_goes_by_itself(model: str, folder: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    expected = {"..": f"{tmp_path.name}-moe", ".": "x-moe"}
    assert str(beside(model, "moe")) == (folder or expected[model])
    with pytest.raises(UsageError, match="has no name"):
        beside("/", "moe")
