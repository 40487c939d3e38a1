"""The help and the option parser's errors, as they are read at 80 columns; completion of names in a shell."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import typer

from moeify.cli.app import COMMANDS, app, run_command
from moeify.cli.help import Command, Description
from moeify.cli.options import expanded

PARSERS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

Help = Callable[[str], str]


@pytest.fixture
def help_of(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Help:
    monkeypatch.setenv("COLUMNS", "80")

    def call(name: str) -> str:
        assert run_command([*name.split(), "--help"]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out

    return call


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_takes_one_line_of_80_columns(name: str, help_of: Help) -> None:
    text = help_of(name)
    assert max(map(len, text.splitlines())) <= 80
    for parameter in PARSERS[name].params:
        name_ = parameter.metavar if parameter.param_type_name == "argument" else max(parameter.opts, key=len)
        either = f"--[no-]{name_[2:]}"
        (line,) = re.findall(rf"^  (?:-\w, )?(?:{re.escape(name_)}|{re.escape(either)})(?= |$).*", text, re.M)
        help_, default = parameter.help.removesuffix("."), getattr(parameter, "show_default", None)
        assert line.endswith(f"{help_} [{default}]" if default and default is not True else help_), line


@pytest.mark.parametrize("name", COMMANDS)
def test_panels_stand_in_order_and_what_is_needed_stands_in_the_first_line(name: str, help_of: Help) -> None:
    text = help_of(name)
    panels = re.findall(r"^(\w.*):$", text, re.M)
    assert panels[-3:] == ["Output", "Advanced", "Example"]
    assert len(set(panels)) == len(panels)
    usage = text.splitlines()[0]
    for parameter in PARSERS[name].params:
        if parameter.required:
            assert parameter.metavar in usage
    assert "{" not in usage


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_at_the_end_is_a_command_line_that_parses(name: str, help_of: Help) -> None:
    example = help_of(name).splitlines()[-1].strip()
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("moeify", name)
    calls = []

    @wraps(COMMANDS[name])
    def see(**values: Any) -> None:
        calls.append(values)

    one = typer.Typer()
    one.command(name, cls=Command)(expanded(see))
    one.command("other")(lambda: None)
    one([name, *arguments], standalone_mode=False)
    assert len(calls) == 1


def test_no_line_of_the_list_of_commands_is_cut(help_of: Help) -> None:
    text = help_of("")
    for name, command in COMMANDS.items():
        line = Description.of(command).line
        assert f"  {name}".ljust(15) + line in text.splitlines()
    assert "..." not in text.partition("Commands:")[2]


def test_the_most_needed_options_of_a_split_come_first(help_of: Help) -> None:
    text = help_of("split")
    assert re.findall(r"^(\w.*):$", text, re.M) == ["Arguments", "Options", "Method", "Output", "Advanced", "Example"]
    order = [text.index(name) for name in ("--experts", "--active", "--partition", "--out", "--seed", "moeify split b")]
    assert order == sorted(order)


MISTYPED = {
    "splt m": "'splt' is not a command of moeify|did you mean split? there are inspect, plan, ",
    "split m --expert 8": "'--expert' is not an option of moeify split|did you mean --experts? `moeify split --help` ",
    "split m --no-refi": "'--no-refi' is not an option of moeify split|did you mean --no-refit? ",
    "split m --xyz": "'--xyz' is not an option of moeify split|`moeify split --help` lists its options",
    "split m --partition kmean": "'kmean' is not a partition|did you mean kmeans? there are contiguous, ",
    "split m --router ridg": "'ridg' is not a router|did you mean ridge? ",
    "split m --target mixtrl": "'mixtrl' is not a target|did you mean mixtral? ",
    "split m --mixing sofmax": "'sofmax' is not a value of --mixing|did you mean softmax? --mixing takes hard, ",
    "split m --vram 6GB": "'--vram' is not an option of moeify split|did you mean --for vram=...?",
    "split m --for vrm=6GB": "--for 'vrm=6GB': 'vrm=6GB' is unknown|did you mean vram? write --for vram=6GB",
    "split m --budget 60": "--budget 60.0 is out of range|did you mean 0.6? --budget takes more than 0 and less than 1",
    "split m --experts many": "--experts many: expected a whole number|write --experts 8",
    "split": "moeify split needs MODEL|such as: moeify split builtin --experts 8 --active 4 -o my-moe",
    "verify m": "moeify verify needs --dense MODEL|such as: moeify verify my-moe --dense builtin",
    "verify m --dense d --tolerance x": "--tolerance x: expected a number|write --tolerance 8",
    "verify m --dense d --tolerance -1": "--tolerance -1.0 is out of range|--tolerance takes 0 or more",
    "inspect a b": "moeify inspect takes no further argument: b|`moeify inspect --help` lists its options",
    "search m --strategy greed": "'greed' is not a strategy|did you mean greedy? ",
    "finetune m --teacher d --stage layer": "'layer' is not a value of --stage|did you mean layers? ",
    "finetune m --teacher d --device gpu": "'gpu' is not a value of --device|--device takes auto, cpu, cuda",
    "eval m --device gpu": "'gpu' is not a value of --device|--device: Where it runs: auto, cpu, cuda, cuda:1",
    "bench-layer --peers eagr": "'eagr' is not a peer|did you mean eager? there are ",
    "bench-layer --cases 64x256": "'64x256' is not a case|write one like 64x256-8/2 ",
    "ls partition": "'partition' is not something that can be listed|did you mean partitions? there are families, ",
    "schema evl": "'evl' is not a schema|did you mean eval? there are ",
}


@pytest.mark.parametrize(("line", "told"), MISTYPED.items(), ids=MISTYPED)
def test_what_was_mistyped_is_named_with_the_nearest(
    line: str, told: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["moeify"])
    assert run_command(line.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    message, hint = told.split("|")
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"error: {message}"
    assert lines[1].startswith(f"hint: {hint}")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("moeify spl", ["split"]),
        ("moeify split m --partition k", ["kmeans"]),
        ("moeify split m --mixing so", ["softmax", "soft"]),
        ("moeify split m --refit-", ["--refit-to"]),
    ],
)
def test_a_shell_completes_commands_options_and_names(words: str, names: list[str]) -> None:
    """As bash asks for them; nothing heavy is imported, or a key would take seconds."""
    program = (
        "import os, sys\nfrom moeify.cli.app import app\n"
        "try: app(prog_name='moeify')\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    environment = {
        "_MOEIFY_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == names, done.stderr
    assert done.stderr.splitlines()[-1] == "False"
