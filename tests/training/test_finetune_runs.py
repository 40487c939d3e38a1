"""Runs that are killed, shared by processes, started by a command or a recipe give what one plain run gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
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
FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]

# `moeify`, killed at the given call of a function.
KILLED = """
import importlib, os, signal, sys
module, name, count = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
really, calls = getattr(owner, last), 0
def wrapped(*arguments, **named):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return really(*arguments, **named)
setattr(owner, last, wrapped)
from moeify.cli.app import main
main()
"""

# `moeify` as `accelerate launch --use_fsdp --fsdp_version 2` starts it. accelerate shards on accelerators alone, so its
# processes are told that they run on some; the tensors and the collectives stay on the CPU.
SHARDED = """
import os, sys
os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
from accelerate.state import PartialState
from accelerate.utils import DistributedType
really = PartialState.__init__
def init(self, *arguments, **named):
    first = not self.initialized
    really(self, *arguments, **named)
    if first:
        self._shared_state["distributed_type"] = DistributedType.MULTI_XPU
PartialState.__init__ = init
from torch.distributed.tensor import DTensor
from moeify.training.trainer import FinetuneTrainer
gather = FinetuneTrainer.trained_state
def trained_state(self):
    if all(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
        sys.stderr.write("sharded parameters\\n")
    return gather(self)
FinetuneTrainer.trained_state = trained_state
from moeify.cli.app import main
main()
"""


@pytest.fixture(scope="module")
def moe(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "moe"
    options = SplitOptions(experts=8, active=4, tokens=4096, context=64, target="glm4_moe")
    split(str(taught), folder, options)
    return folder


def start(command: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in one thread each."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=DEADLINE_S)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def history(folder: Path) -> list[dict[str, Any]]:
    stages = json.loads((folder / "finetune.json").read_text())["stages"]
    return [entry for stage in stages for entry in stage["history"]]


@pytest.mark.slow
@pytest.mark.parametrize("last_stage", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_bits(moe: Path, taught: Path, tmp_path: Path, last_stage: str) -> None:
    stages = ["--stage", "layers", "--stage", last_stage]
    arguments = ["finetune", str(moe), "--teacher", str(taught), *FLAGS, *stages, "-o"]
    whole = start([sys.executable, "-m", "moeify", *arguments, str(tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    for module, name, count in (
        ("moeify.training.layers", "_fit", 2),
        ("moeify.training.stage", "ProgressCallback.on_step_end", 6),
        ("transformers", "Trainer._save_rng_state", 2),
        ("moeify.training.stage", "ProgressCallback.on_step_end", 7),
        ("moeify.training.writer", "check_fits", 3),
    ):
        killed = start([sys.executable, "-c", KILLED, module, name, str(count), *arguments, str(out)])
        assert killed.returncode == -9, f"{name}: {killed.stderr}"
        assert not out.exists()
    resumed = start([sys.executable, "-m", "moeify", *arguments, str(out)])
    assert resumed.returncode == 0, resumed.stderr
    expected, found = weights(tmp_path / "whole"), weights(out)
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert history(out) == history(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "fsdp2"])
def test_two_processes_follow_the_curve_of_one(moe: Path, taught: Path, tmp_path: Path, launcher: str) -> None:
    options = FinetuneOptions(stage=("layers", "full"), **OPTIONS)
    finetune(str(moe), str(taught), tmp_path / "one", options)
    arguments = ["finetune", str(moe), "--teacher", str(taught), *FLAGS, "--batch", "4"]
    program = ["-c", SHARDED] if launcher == "fsdp2" else ["-m", "moeify"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable]
    done = start([sys.executable, *launch, *program, *arguments, "-o", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("moeify finetune") == 1
    assert done.stderr.count("sharded parameters") == (2 if launcher == "fsdp2" else 0)
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for name in ("loss", "kl", "balance", "load_entropy", "eval_kl"):
        expected, found = ([entry[name] for entry in entries if name in entry] for entries in (one, two))
        assert len(expected) >= 3
        assert found == pytest.approx(expected, rel=2e-3), name
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name].float(), tensor.float(), rtol=0.02, atol=2e-3)


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


def test_an_unfinished_run_of_other_options_is_refused(moe: Path, taught: Path, tmp_path: Path) -> None:
    arguments = ["finetune", str(moe), "--teacher", str(taught), *FLAGS, "--quiet", "-o", str(tmp_path / "out")]
    killed = start(
        [sys.executable, "-c", KILLED, "moeify.training.layers", "_fit", "1", *arguments],
    )
    assert killed.returncode == -9
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
