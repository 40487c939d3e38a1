"""The command line: light until a command runs, one exit code an outcome, results on stdout and all else on stderr."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import MakeDense

from moeify import engines, families, partition, routers, strategies, targets
from moeify import plugin_list as listing
from moeify.check.evaluate import Evaluation
from moeify.check.perplexity import EvalResult
from moeify.cli.app import app, run_command
from moeify.cli.options import KINDS
from moeify.command_line import quoted
from moeify.errors import CheckError, InputError, UsageError
from moeify.options import ExportOptions, SplitOptions
from moeify.version import __version__
from moeify.words import DEFINITIONS

COMMANDS = [
    *("inspect", "plan", "split", "search", "compare", "finetune", "export", "verify", "eval"),
    *("generate", "chat"),
    *("tune", "bench", "bench-layer", "report", "init", "run", "ls", "schema"),
]
SHARED_OPTIONS = [
    *("out", "device", "dtype", "seed", "json", "quiet", "verbose", "overwrite", "debug"),
    *("calibration", "context", "data", "partition", "router", "refit_to"),
]
HEAVY = ["torch", "transformers", "numpy", "sklearn", "datasets", "safetensors"]

Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=128, max_position_embeddings=64)


@pytest.fixture(scope="module")
def text(calibration_file: Path) -> list[str]:
    return ["--calibration", str(calibration_file), "--tokens", "1024"]


@pytest.fixture(scope="module")
def moe(dense: Path, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model."""
    out = tmp_path_factory.mktemp("cli") / "moe"
    assert run_command(["split", str(dense), *text, "-o", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def as_json(capfd: pytest.CaptureFixture[str]) -> Call:
    """as_json(*arguments, code=0): the one object on stdout, at the level of the process."""

    def call(*arguments: str, code: int = 0) -> dict[str, Any]:
        capfd.readouterr()
        assert run_command([*arguments, "--json"]) == code
        out, err = capfd.readouterr()
        assert out.startswith("{"), out
        found = json.loads(out)
        assert isinstance(found, dict)
        # A run says which stage is finished, and the text of these tests is one document.
        said = r"\d of \d, |.* to .*, \d stages: |warning: the calibration text is of one kind"
        other = [line for line in err.splitlines() if not re.match(said, line)]
        assert (code == 0) == (not other), err
        return found

    return call


def command_options() -> dict[str, dict[str, Any]]:
    """Options of every command as the parser knows them: {command: {name: parameter}}."""
    group: Any = typer.main.get_command(app)
    return {name: {option.name: option for option in command.params} for name, command in group.commands.items()}


def test_the_commands() -> None:
    assert sorted(command_options()) == sorted(COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from moeify.cli.app import run_command\n"
        "code = run_command(sys.argv[1:])\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == (0 if arguments else 2)
    if arguments == ["--version"]:
        assert done.stdout == f"moeify {__version__}\n"
    else:
        assert "Usage: " in (done.stdout or done.stderr)


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = f"import moeify, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_option_of_a_split_is_on_the_command_line_with_its_default() -> None:
    options = command_options()["split"]
    defaults = SplitOptions()
    for field in dataclasses.fields(SplitOptions):
        value = getattr(defaults, field.name)
        told = options[field.name].show_default
        words = ",".join(map(str, value)) if isinstance(value, tuple) else "on" if value is True else str(value)
        is_open = value is None or value is False or value == ()
        assert told == (field.metadata["auto"] or False if is_open else words), field.name
    rest = {
        *(field.name for field in dataclasses.fields(ExportOptions)),
        "gguf",
        "minutes",
        "model",
        "out",
        "overwrite",
        "report",
        "dry_run",
        "push_to_hub",
        "private",
        "json",
        "quiet",
        "verbose",
        "debug",
    }
    assert set(options) - {field.name for field in dataclasses.fields(SplitOptions)} == rest


def test_options_reach_the_split(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, each with a value that is not its default."""
    values: dict[str, Any] = {
        "experts": 4,
        "shared": 1,
        "active": 2,
        "partition": "kmeans",
        "router": "mlp",
        "budget": 0.8,
        "dense_layers": (0, 3, 11),
        "mixing": "softmax",
        "temperature": 0.5,
        "fusion": "mean",
        "refit": False,
        "refit_to": "stream",
        "target": "mixtral",
        "engine": "vLLM",
        "calibration": ("a", "b"),
        "tokens": 2048,
        "context": 32,
        "seed": 7,
        "dtype": "bfloat16",
        "device": "cuda:1",
        "plan": "somewhere",
        "drop_layers": (1,),
        "hidden_states": "disk",
        "remote_code": True,
    }
    own = {"min_active", "max_active", "active_by_layer", "experts_by_layer", "static_layers"}
    # These exclude others.
    assert {field.name for field in dataclasses.fields(SplitOptions)} == {*values, *own, "static", "machine"}
    seen = []

    def split(model: str, out: Path, options: SplitOptions, **arguments: Any) -> None:
        seen.append((model, out, options, arguments["overwrite"]))
        raise InputError("enough", "seen")

    monkeypatch.setattr(importlib.import_module("moeify.convert.pipeline"), "split", split)
    flags = ["--overwrite", "--calibration", "a", "--calibration", "b", "-o", "there"]
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif name != "calibration":
            word = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags += [f"--{name.replace('_', '-')}", word]
    assert run_command(["split", "some/model", *flags]) == 3
    assert run_command(["split", "some/model", "--static"]) == 3
    assert run_command(["split", "some/model/"]) == 3
    assert run_command(["split", "some/model", "--for", "ram=50", "-o", "there"]) == 3
    assert seen == [
        ("some/model", Path("there"), SplitOptions(**values), True),
        ("some/model", Path("model-static"), SplitOptions(static=True), False),
        ("some/model/", Path("model-moe"), SplitOptions(), False),
        ("some/model", Path("there"), SplitOptions(machine="ram=50"), False),
    ]


@pytest.mark.parametrize("option", SHARED_OPTIONS)
def test_a_shared_option_has_one_spelling_and_one_meaning(option: str) -> None:
    found = {name: options[option] for name, options in command_options().items() if option in options}
    assert found
    assert len({tuple(entry.opts) for entry in found.values()}) == 1
    # What is written is a folder of checkpoints; where it is one file, the help says so.
    files = {
        name for name in found if option == "out" and name in ("search", "compare", "bench-layer", "init", "report")
    }
    assert all(found[name].help.startswith(("FILE.json; ", "FILE.html; ", "FILE.yaml ")) for name in files)
    # That of a plan is what an engine keeps of a conversation, as in llama.cpp's -c, and no block of text.
    # Training runs on one device of a kind, which torchrun chooses.
    other = {"context": {"plan", "init"}, "device": {"finetune"}}.get(option, set())
    words = {"context": "cache of keys, values", "device": "auto, cpu, cuda"}
    assert all(words[option] in found[name].help for name in other)
    helps = {entry.help for name, entry in found.items() if name not in files | other}
    assert len(helps) == 1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["json", "quiet", "verbose", "debug"])
def test_every_command_has_it(command: str, option: str) -> None:
    assert option in command_options()[command]


def test_every_option_says_what_it_is() -> None:
    for command, options in command_options().items():
        for name, option in options.items():
            assert getattr(option, "help", ""), (command, name)


OUTCOMES = [
    (UsageError("found this", "do that"), 2),
    (InputError("found this", "do that"), 3),
    (CheckError("found this", "do that"), 4),
    (KeyboardInterrupt(), 130),
    (ZeroDivisionError("found this"), 1),
    (AssertionError("found this"), 1),
]


@pytest.mark.parametrize(("error", "code"), OUTCOMES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "flags", [(), ("--debug",), ("--json",), ("--quiet",)], ids=lambda flags: "".join(flags) or "-"
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    flags: tuple[str, ...],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("moeify.convert.pipeline"), "split", fail)
    assert run_command(["split", "some/model", *flags]) == code
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    if code == 130:
        assert lines == ["interrupted"]
        return
    if "--debug" in flags:
        assert lines[0] == "Traceback (most recent call last):"
        assert "in fail" in err
    else:
        assert lines[0].startswith("error: ")
        assert "Traceback" not in err
    if code == 1:
        assert "found this" in err
        assert "a bug in moeify" in err
        assert type(error).__name__ in err
    else:
        assert lines[-2:] == ["error: found this", "hint: do that"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["split"],
        ["split", "model", "--no-such-option"],
        ["split", "model", "--experts", "many"],
        ["split", "model", "--dtype", "int8"],
        ["verify", "moe"],
        ["ls"],
        ["ls", "wishes"],
        ["eval"],
        ["run"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "rror" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("values", [["--static", "--shared", "2"], ["--experts", "1"], ["--partition", "nothing"]])
def test_options_that_contradict_each_other(dense: Path, values: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["split", str(dense), *values]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_an_input_that_cannot_be_converted(dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["split", str(dense), "--experts", "7", "-o", str(tmp_path / "out")]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        "error: 128 neurons do not divide into 7 experts\n"
        "hint: --experts 2, 4, 8, 16, 32 work for this model; --target moeify takes every number\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_about_an_error_is_not_broken_into_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """So that it can be copied and searched for, and square brackets are not taken for markup."""
    name = "[bold]" + "x" * 200 + "[_]"
    assert run_command(["inspect", f"./{name}"]) == 3
    assert capfd.readouterr().err.splitlines()[0] == f"error: no model at ./{name}"


def test_json_of_split_inspect_and_verify(dense: Path, text: list[str], tmp_path: Path, as_json: Call) -> None:
    found = as_json("inspect", str(dense))
    assert found["schema"] == "moeify.inspect/1"
    assert (found["family"], found["num_layers"], found["hidden_size"], found["num_neurons"]) == ("llama", 2, 32, 128)
    assert {entry["target"] for entry in found["targets"] if entry["fits"]} >= {"granitemoeshared", "mixtral"}
    out = tmp_path / "out"
    planned = as_json("split", str(dense), *text, "-o", str(out), "--dry-run")
    assert planned["schema"] == "moeify.preview/1"
    assert not out.exists()
    done = as_json("split", str(dense), *text, "-o", str(out))
    assert done["schema"] == "moeify.split/1"
    assert done["out"] == str(out)
    assert done["layout"] == planned["layout"]
    assert done["layout"] == {
        "num_experts": 8,
        "num_shared": 2,
        "num_active": 6,
        "dense_layers": [],
        "min_active": 0,
        "max_active": 0,
        "active_by_layer": [],
        "static_layers": [],
        "experts_by_layer": [],
    }
    assert done["num_active_parameters"] == planned["num_active_parameters"] < done["num_parameters"]
    assert [layer["layer"] for layer in done["plan"]["layers"]] == [0, 1]
    report = as_json("verify", str(out), "--dense", str(dense))
    assert report["schema"] == "moeify.verify/1"
    assert report["passed"] is True
    assert all(check["passed"] for check in report["checks"])


def test_json_of_eval(dense: Path, moe: Path, as_json: Call) -> None:
    found = as_json("eval", str(dense), str(moe), "--tokens", "1024")
    assert found["schema"] == "moeify.eval/1"
    assert [entry["model"] for entry in found["results"]] == [str(dense), str(moe)]
    assert all(entry["perplexity"] > 1 and entry["num_tokens"] == 1024 - 16 for entry in found["results"])


def test_json_of_run(dense: Path, text: list[str], tmp_path: Path, as_json: Call) -> None:
    recipe = {
        "version": 1,
        "model": str(dense),
        "out": str(tmp_path / "runs"),
        "split": {"calibration": [text[1]], "tokens": 1024},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = as_json("run", str(tmp_path / "recipe.yaml"))
    assert found["schema"] == "moeify.run/1"
    assert (found["passed"], found["skipped"], found["evals"]) == (True, [], [])
    assert as_json("run", str(tmp_path / "recipe.yaml"))["skipped"] == ["moe"]


@pytest.mark.parametrize("kind", KINDS.split())
def test_json_of_ls(kind: str, as_json: Call) -> None:
    found = as_json("ls", kind)
    assert (found["schema"], found["kind"]) == ("moeify.ls/1", kind)
    names = {
        "families": families.names,
        "targets": targets.names,
        "partitions": partition.names,
        "routers": routers.names,
        "engines": engines.names,
        "strategies": strategies.names,
    }
    recipes = [path.stem for folder in listing.recipe_folders() for path in folder.glob("*.yaml")]
    others = {"recipes": recipes, "words": DEFINITIONS}
    assert set(found["entries"]) == set(names[kind]() if kind in names else others[kind])
    assert all(what.endswith((".", ":")) or len(what) > 20 for what in found["entries"].values())


@pytest.mark.parametrize("kind", KINDS.split())
def test_ls_shows_every_entry(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["ls", kind]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert all(name in out for name in listing.listing(kind).entries)


def test_a_check_that_fails_gives_its_object_and_exit_code_4(dense: Path, moe: Path, as_json: Call) -> None:
    found = as_json("verify", str(moe), "--dense", str(dense), "--tolerance", "0", code=4)
    assert found["schema"] == "moeify.verify/1"
    assert found["passed"] is False


def test_an_error_under_json_leaves_stdout_empty(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", "./nothing", "--json"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")


def test_json_of_an_infinite_perplexity_is_json(dense: Path, monkeypatch: pytest.MonkeyPatch, as_json: Call) -> None:
    module = importlib.import_module("moeify.check.evaluate")
    for value in (float("inf"), float("nan")):
        result = EvalResult("a", "b", value, 1, 1.0, "")
        monkeypatch.setattr(module, "measure", lambda *_, result=result, **__: Evaluation((result,)))
        assert as_json("eval", str(dense))["results"][0]["perplexity"] is None


@pytest.mark.parametrize("command", ["inspect", "split", "verify", "eval", "ls"])
def test_quiet_prints_figures_alone(
    dense: Path, moe: Path, text: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = {
        "inspect": [str(dense)],
        "split": [str(dense), *text, "-o", str(tmp_path / "out")],
        "verify": [str(moe), "--dense", str(dense)],
        "eval": [str(dense), "--tokens", "1024"],
        "ls": ["targets"],
    }[command]
    assert run_command([command, *arguments, "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert "next:" not in out
    # Its text is one document.
    assert re.fullmatch(r"(warning: the calibration text is of one kind.*\n)?" if command == "split" else "", err)
    # A checkpoint lies on the disk; figures are nowhere else.
    assert bool(out) == (command != "split")


def test_quiet_does_not_hide_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", "./nothing", "--quiet"]) == 3
    assert capfd.readouterr().err.startswith("error: ")


def test_a_dry_run_writes_nothing(
    dense: Path, text: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in dense.iterdir()}
    assert run_command(["split", str(dense), *text, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in dense.iterdir()} == before
    out, _ = capfd.readouterr()
    assert "2 shared + 4 of 6 routed" in out


def test_a_dry_run_refuses_what_the_split_would_refuse(dense: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["split", str(dense), "--experts", "7", "--dry-run"]) == 3
    assert "do not divide" in capfd.readouterr().err


def test_an_interrupt_that_compiled_code_turns_into_another_error_gives_130(tmp_path: Path) -> None:
    """torch and safetensors read under a signal that was raised meanwhile, and report what they were doing instead."""
    disguised = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moeify import plugin_list\n"
        "from moeify.cli import app as cli\n"
        "def listing_(kind):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt: raise ValueError('could not determine the shape') from None\n"
        "plugin_list.listing = listing_\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", disguised, "ls", "targets"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_gives_130_and_can_be_resumed(
    dense: Path, text: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real SIGINT to a real process, in the middle of its work."""
    slow = (
        # A background job of a shell without job control, as in CI, inherits that SIGINT is ignored.
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moeify import cache; from moeify.cli.app import main\n"
        "really_sync = cache.sync\n"
        "cache.sync = lambda path: (time.sleep(0.3), really_sync(path))\n"
        "main()"
    )
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", slow, "split", str(dense), *text, "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(partial.glob("work/*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert said == ""
    assert partial.is_dir()
    assert not out.exists()
    one_kind, interrupted, kept, again = errors.splitlines()
    assert one_kind.startswith("warning: the calibration text is of one kind")
    assert interrupted == "interrupted"
    assert re.fullmatch(rf"kept: finished layers: \d, .* kB in {partial}", kept)
    assert again == f"to go on: moeify {quoted(['split', str(dense), *text, '-o', str(out)])}"
    capfd.readouterr()
    assert run_command(shlex.split(again)[4:]) == 0
    assert re.search(r"^splitting layers: \d of 2 are there from an earlier run$", capfd.readouterr().err, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_closed_pipe_is_no_bug(dense: Path) -> None:
    """`moeify ls targets | head -1`."""
    command = [sys.executable, "-c", "from moeify.cli.app import main; main()", "ls", "targets"]
    reader, output = os.pipe()
    os.close(reader)
    with contextlib.closing(os.fdopen(output, "w")) as broken:
        done = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, check=False)
    assert "bug" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_installed_script_is_this_command_line() -> None:
    from importlib.metadata import entry_points

    found = entry_points(group="console_scripts", name="moeify")
    assert [entry.value for entry in found] == ["moeify.cli.app:main"]
