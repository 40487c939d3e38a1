"""The last line of a table names a command that can be pasted, from any folder and with any names, and that runs."""

import shlex
import shutil
from pathlib import Path

import pytest
from conftest import MakeDense

from moeify import targets
from moeify.benchmark.engines import programs
from moeify.cli.app import run_command
from moeify.cli.options import is_there

NAME = "a model's [b]"
# What keeps a step short, unless the line says it already.
SHORT = {
    "split": ("--calibration", "t,1.txt", "--tokens", "1024"),
    "eval": ("--data", "t,1.txt", "--tokens", "128"),
    "search": ("--calibration", "t,1.txt", "--tokens", "1024"),
}
CHAINS = {
    "inspect": ["inspect", "split", "verify", "eval"],
    # Seven does not divide the FFN, and another number is looked at instead.
    "inspect --experts 7": ["inspect", "split"],
    "split --static": ["split", "eval"],
    "split --dry-run --experts 4 --report -o -x": ["split", "split"],
    "search --experts 4 --budget 0.75 --trials 2": ["search", "split"],
}


def run_all(arguments: list[str], capfd: pytest.CaptureFixture[str], *, most: int = 4) -> list[list[str]]:
    """Run a command and then what each one names as the next, so many at most; returns them all."""
    lines: list[list[str]] = []
    while arguments and len(lines) < most:
        lines.append(arguments)
        extra = SHORT.get(arguments[0], ())
        more = [word for pair in zip(extra[::2], extra[1::2], strict=True) if pair[0] not in arguments for word in pair]
        more = [f'"{word}"' if "," in word else word for word in more]
        code = run_command([*arguments, *more])
        out, err = capfd.readouterr()
        assert code == 0, err
        assert "error" not in err
        last = out.splitlines()[-1]
        words = shlex.split(last.removeprefix("next: ")) if last.startswith("next: ") else [""]
        arguments = words[1:]
        assert words[0] in ("moeify", "")
    return lines


@pytest.fixture
def here(make_dense: MakeDense, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text of names that need quotes, in which commands run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_dense("llama", intermediate_size=128, max_position_embeddings=64), NAME)
    shutil.copy(calibration_file, "t,1.txt")
    return tmp_path


@pytest.mark.parametrize(("start", "commands"), CHAINS.items(), ids=CHAINS)
def test_each_step_names_the_next(
    here: Path, start: str, commands: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    command, *options = start.split()
    lines = run_all([command, NAME, *options], capfd, most=len(commands))
    assert [line[0] for line in lines] == commands
    assert all(any(NAME in word for word in line) for line in lines)
    if "--dry-run" in options:
        assert "--report" in lines[1]
        assert (here / "-x").is_dir()


def test_what_no_target_holds_is_pruned(
    here: Path, make_dense: MakeDense, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were there no architecture of moeify's own."""
    stock = [name for name in targets.names() if targets.find(name).is_stock]
    monkeypatch.setattr(targets, "names", lambda: stock)
    lines = run_all(["inspect", str(make_dense("gpt2"))], capfd)
    assert [line[0] for line in lines] == ["inspect", "split", "eval"]
    assert "--static" in lines[1]


def test_a_gguf_is_verified_and_timed_only_where_llama_cpp_is(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    assert run_command(["split", NAME, *("--calibration", '"t,1.txt"', "--tokens", "1024", "-o", "moe", "-q")]) == 0
    monkeypatch.setattr(programs, "find", lambda _: None)
    lines = run_all(["export", "moe", "--gguf", "m o.gguf"], capfd)
    assert [line[0] for line in lines] == ["export", "verify"]
    monkeypatch.setattr(programs, "find", lambda name: Path("/bin") / name)
    assert run_command(lines[1]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert shlex.split(last)[1:] == ["moeify", "bench", "m o.gguf", "--engine", "llama.cpp", "--against", NAME]


def test_a_model_is_named_again_only_where_it_is(here: Path) -> None:
    assert is_there(NAME)
    assert is_there("builtin")
    assert is_there("org/name")
    assert not is_there("../elsewhere/model")
    assert not is_there("")
