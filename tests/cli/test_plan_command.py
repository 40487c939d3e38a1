"""`moeify plan` and `moeify split --for` on the command line."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import MakeDense

from moeify.cli.app import run_command

FOR = "vram=0,ram=10"


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", num_hidden_layers=2, hidden_size=64, intermediate_size=1024)


def test_the_plan_names_the_best_and_the_next_command_takes_it(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert run_command(["plan", str(dense), "--vram", "0", "--ram-bandwidth", "10", "--type", "q8_0"]) == 0
    printed = capsys.readouterr()
    text = printed.out + printed.err
    best = next(line for line in text.splitlines() if ", best" in line)
    command = next(line for line in text.splitlines() if line.startswith("next: moeify split"))
    words = shlex.split(command)
    experts, shared, active = (words[words.index(flag) + 1] for flag in ("--experts", "--shared", "--active"))
    assert f"{active} of {experts}, {shared} shared" in best
    assert "-ngl 0" in text
    assert "no GPU, RAM at 10.0 GB/s" in text
    assert "GPU/token" not in text
    assert "larger models lose less" in text
    assert run_command(["split", str(dense), "--for", FOR, "--dry-run", "--json"]) == 0
    layout = json.loads(capsys.readouterr().out)["layout"]
    assert [str(layout[key]) for key in ("num_experts", "num_shared", "num_active")] == [experts, shared, active]


def test_a_gpu_has_columns_of_its_own(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    machine = ["--vram", "6GB", "--gpu-bandwidth", "250", "--ram-bandwidth", "50", "--ram", "32GB"]
    assert run_command(["plan", str(dense), *machine]) == 0
    text = capsys.readouterr().out
    assert "6.00 GB of VRAM at 250 GB/s, 32.0 GB of RAM at 50.0 GB/s" in text
    header = next(line for line in text.splitlines() if "perplexity / dense" in line)
    places = [header.index(word) for word in ("GPU / token", "RAM / token", "tokens/s")]
    assert places == sorted(places)
    bound, options = (line for line in text.splitlines() if line.startswith("dense "))
    # All of it is on the GPU, and nothing is read from RAM.
    assert "0 B" in bound
    assert "-ngl 99 -c 64" in options


def test_the_plan_is_one_json_object(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_command(["plan", str(dense), "--vram", "6GB", "--gpu-bandwidth", "250", "--ram-bandwidth", "50", "--json"])
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == "moeify.machine-plan/1"
    assert plan["candidates"][0]["placement"]["flags"] == "-ngl 99 -c 64"
    assert plan["candidates"][plan["best"]]["kind"] == "moe"


WRONG = {
    "plan MODEL --vram 6 --gpu-bandwidth 5": (2, "--vram '6': expected a size with its unit"),
    "plan MODEL --ram-bandwidth nan": (2, "--ram-bandwidth nan is out of range"),
    "plan MODEL --ram-bandwidth 1e400": (2, "--ram-bandwidth inf is out of range"),
    "plan MODEL --gpu-bandwidth -3": (2, "--gpu-bandwidth -3.0 is out of range"),
    "plan MODEL --type q9_0 --ram-bandwidth 5": (2, "q9_0"),
    "plan MODEL --context 1000000 --ram-bandwidth 5": (2, "context 1,000,000 does not fit"),
    "plan MODEL/nothing --ram-bandwidth 5": (3, "nothing"),
    "split MODEL --for vram=6,gpu=250": (2, "--vram '6': expected a size"),
    "split MODEL --for ram=50 --active 3": (2, "--for chooses the layout, --active as well"),
    "split MODEL --for vram=0,ram=50,quality=1": (3, "no layout of"),
}


@pytest.mark.parametrize("line", WRONG)
def test_errors_say_what_was_found(line: str, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = WRONG[line]
    assert run_command(line.replace("MODEL", str(dense)).split()) == code
    printed = capsys.readouterr()
    assert message in " ".join(printed.err.split())
    assert not printed.out
