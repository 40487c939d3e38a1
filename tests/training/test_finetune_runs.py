"""Runs that are killed, shared by processes, started by a command or a recipe give what one plain run gives."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_process import Run, die_at, main
from safetensors.torch import load_file

from moeify.cli.app import run_command
from moeify.convert.pipeline import split
from moeify.options import SplitOptions
from moeify.plan import load_plan
from moeify.recipes.model import load_recipe
from moeify.recipes.run import run
from moeify.training.finetune import finetune
from moeify.training.options import FinetuneOptions

DEADLINE_S = 300
OPTIONS = {"tokens": 8192, "context": 64, "batch": 8, "eval_tokens": 1024, "learning_rate": 1e-3, "every": 4}
# Curves of several processes are compared more closely than bfloat16 rounds.
OPTIONS |= {"precision": "float32"}
FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]

Start = Callable[..., list[int]]


@pytest.fixture(scope="module")
def moe(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "moe"
    options = SplitOptions(experts=8, active=4, tokens=4096, context=64, target="glm4_moe")
    split(str(taught), folder, options)
    return folder


@pytest.fixture
def start(forking: Any, monkeypatch: pytest.MonkeyPatch) -> Start:
    """start(run, ...) -> exit codes of processes that run at once, in one thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def started(*runs: Run) -> list[int]:
        processes = [forking.Process(target=main, args=(run,)) for run in runs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(DEADLINE_S)
            process.kill()
            process.join()
        return [process.exitcode for process in processes]

    return started


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def history(folder: Path) -> list[dict[str, Any]]:
    stages = json.loads((folder / "finetune.json").read_text())["stages"]
    return [entry for stage in stages for entry in stage["history"]]


@pytest.mark.slow
@pytest.mark.parametrize("last_stage", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_bits(
    moe: Path, taught: Path, tmp_path: Path, last_stage: str, start: Start
) -> None:
    stages = ["--stage", "layers", "--stage", last_stage]
    arguments = ["finetune", str(moe), "--teacher", str(taught), *FLAGS, *stages, "-o"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run = Run([*arguments, str(whole)], tmp_path / "log")
    assert start(run) == [0], run.errors
    for module, name, count in (
        ("moeify.training.layers", "_fit", 2),
        ("moeify.training.stage", "ProgressCallback.on_step_end", 6),
        ("transformers", "Trainer._save_rng_state", 2),
        ("moeify.training.stage", "ProgressCallback.on_step_end", 7),
        ("moeify.training.writer", "check_fits", 3),
    ):
        run = Run([*arguments, str(out)], tmp_path / "log", prepare=partial(die_at, module, name, count))
        assert start(run) == [-signal.SIGKILL], f"{name}: {run.errors}"
        assert not out.exists()
    run = Run([*arguments, str(out)], tmp_path / "log")
    assert start(run) == [0], run.errors
    expected, found = weights(whole), weights(out)
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    # Of every other file all bytes; TensorBoard's hold times, host and process, in their names as well.
    alike = {path.name for path in whole.iterdir() if path.is_file()}
    assert {path.name for path in out.iterdir()} == {*alike, "logs"}
    assert [name for name in alike if (out / name).read_bytes() != (whole / name).read_bytes()] == []


@pytest.fixture(scope="module")
def alone(moe: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    finetune(str(moe), str(taught), out, FinetuneOptions(stage=("layers", "full"), **OPTIONS))
    return out


def shard() -> None:
    """As `accelerate launch --use_fsdp --fsdp_version 2` does.

    accelerate shards on accelerators alone, so it is told that it runs on some; tensors stay on the CPU.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    from moeify.training.trainer import FinetuneTrainer

    really, gather = PartialState.__init__, FinetuneTrainer.trained_state

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        first = not self.initialized
        really(self, *arguments, **named)
        if first:
            self._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    def trained_state(self: Any) -> Any:
        if all(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            sys.stderr.write("sharded parameters\n")
        return gather(self)

    PartialState.__init__ = init  # type: ignore[method-assign]
    FinetuneTrainer.trained_state = trained_state  # type: ignore[method-assign]


def sharded(arguments: list[str], folder: Path) -> list[Run]:
    """Two processes that find each other as those of any launcher do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [Run(arguments, folder / place["RANK"], prepare=shard, environment=place) for place in places]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "fsdp2"])
def test_two_processes_follow_the_curve_of_one(
    moe: Path, taught: Path, alone: Path, tmp_path: Path, launcher: str, start: Start
) -> None:
    out = tmp_path / "two"
    arguments = ["finetune", str(moe), "--teacher", str(taught), *FLAGS, "--batch", "4", "-o", str(out)]
    if launcher == "torchrun":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moeify"]
        command = [sys.executable, *launch, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("moeify finetune") == 1
    else:
        runs = sharded(arguments, tmp_path)
        assert start(*runs) == [0, 0], "".join(run.errors[-3000:] for run in runs)
        assert [run.log.read_text().count("moeify finetune") for run in runs] == [1, 0]
        assert [run.errors.count("sharded parameters") for run in runs] == [1, 1]
    one, two = history(alone), history(out)
    for name in ("loss", "kl", "balance", "load_entropy", "eval_kl"):
        expected, found = ([entry[name] for entry in entries if name in entry] for entries in (one, two))
        assert len(expected) >= 3
        assert found == pytest.approx(expected, rel=2e-3), name
    trained = weights(out)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(trained[name].float(), tensor.float(), rtol=0.02, atol=2e-3)


def test_the_command_line_trains_and_shows_both_figures(
    moe: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["finetune", str(moe), "--teacher", str(taught), *FLAGS, "-o", str(tmp_path / "out")]
    assert run_command([*arguments, "--stage", "router", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "moeify.finetune/1"
    # So short a training may go either way on another Python's text; that stages help is tested in test_finetune.py.
    before, after = (found["stages"][0][when] for when in ("before", "after"))
    assert set(before) == set(after) == {"loss", "kl", "lm", "perplexity"}
    assert all(before[name] != after[name] > 0 for name in before)
    assert run_command([*arguments, "--stage", "router"]) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert run_command([*arguments, "--stage", "router", "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "KL to the teacher" in shown
    assert "next: moeify eval" in shown
    assert run_command([*arguments, "--stage", "all"]) == 2
    assert "layers, router, lora, full" in capsys.readouterr().err


def test_an_unfinished_run_of_other_options_is_refused(moe: Path, taught: Path, tmp_path: Path, start: Start) -> None:
    arguments = ["finetune", str(moe), "--teacher", str(taught), *FLAGS, "--quiet", "-o", str(tmp_path / "out")]
    run = Run(arguments, tmp_path / "log", prepare=partial(die_at, "moeify.training.layers", "_fit", 1))
    assert start(run) == [-signal.SIGKILL], run.errors
    assert run_command([*arguments, "--kl", "2"]) == 3
    assert run_command([*arguments, "--kl", "2", "--overwrite", "--stage", "router"]) == 0


def test_a_recipe_trains_the_split_and_its_control_and_judges_what_came_out(taught: Path, tmp_path: Path) -> None:
    recipe = {
        "version": 1,
        "model": str(taught),
        "out": str(tmp_path / "run"),
        "split": {"experts": 8, "active": 4, "tokens": 4096, "context": 64},
        "controls": {"static": {"static": True}, "random": {"partition": "random"}},
        "finetune": {**OPTIONS, "stage": ["layers", "full"], "tokens": 16_384},
        "finetune_controls": ["static"],
        "eval": {"data": ["builtin-heldout"], "tokens": 2048, "context": 64},
        "limits": {"beats": ["random"], "max_ratio": 3.0},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    result = run(load_recipe(file))
    perplexity = {Path(row.model).name: row.perplexity for row in result.evals}
    assert perplexity["moe-finetuned"] < perplexity["moe"]
    assert perplexity["static-finetuned"] < perplexity["static"]
    assert "random-finetuned" not in perplexity
    assert f"{perplexity['moe-finetuned']:.3f}" in {limit.measured for limit in result.limits}
    assert load_plan(tmp_path / "run" / "moe-finetuned").trained == ("layers", "full")
    assert set(run(load_recipe(file)).skipped) == {"moe", "static", "random", "moe-finetuned", "static-finetuned"}
    changed = run(load_recipe(file, ["finetune.kl=0.5"]))
    assert set(changed.skipped) == {"moe", "static", "random"}
