"""Every command is killed at random moments and started again: nothing half-written looks whole, the end is the same.

pytest tests/test_kills.py -s -m stress                     # five kills of each command
MOEIFY_KILLS=15 MOEIFY_SEED=3 pytest tests/test_kills.py -s -m stress
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_process import Run, main, tree
from conftest import MakeDense

KILLS = int(os.environ.get("MOEIFY_KILLS", "5"))
SEED = int(os.environ.get("MOEIFY_SEED", "0"))
DEADLINE_S = 600
# Not yet whole by their names, and markers, which say themselves whether their stage is done.
UNFINISHED = ("*.done", "*.tmp", "*.partial/*", "*.partial-*", ".*.lock", "*/.tmp*", "*/.*.lock", "*.replaced-*")
# Their names hold the time, the host and the process.
EVENTS = "*/logs/*/events.out.tfevents.*"


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        arguments: given the folder that it works in.
        timed: files that hold times or what was skipped; they only must be whole.
    """

    arguments: Callable[[Path], list[str]]
    timed: tuple[str, ...] = ()


@dataclass
class Sources:
    """What the commands read."""

    dense: Path
    moe: Path
    text: Path
    recipe: Path = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = self.moe.parent / "recipe.yaml"
        self.recipe.write_text(
            f"version: 1\nmodel: {self.dense}\nout: run\n"
            f"split: {{experts: 8, tokens: 1024, calibration: ['{self.text}']}}\n"
            f"controls: {{static: {{static: true}}}}\n"
            f"eval: {{data: ['{self.text}'], tokens: 1024}}\n"
        )

    def jobs(self) -> dict[str, Job]:
        dense, text = str(self.dense), ["--calibration", str(self.text), "--tokens", "1024"]
        data = ["--data", str(self.text), "--data-tokens", "512"]
        tuned = ["--data", str(self.text), "--tokens", "1024", "--eval-data", str(self.text), "--eval-tokens", "256"]
        return {
            "split": Job(lambda at: ["split", dense, *text, "-o", f"{at}/moe"]),
            "search": Job(lambda at: ["search", dense, "--budget", "0.6", *text, "-o", f"{at}/search.json"]),
            "compare": Job(
                lambda at: [
                    *("compare", dense, "--budget", "0.5", *text, *data, "-o", f"{at}/compare.json"),
                    *("--method", "CMoE", "--method", "static", "--method", "neuron oracle"),
                ]
            ),
            "finetune": Job(
                lambda at: [
                    *("finetune", str(self.moe), "--teacher", dense, *tuned, "--batch", "4", "--cache-teacher"),
                    *("--stage", "layers", "--stage", "full", "-o", f"{at}/tuned"),
                ]
            ),
            "run": Job(lambda at: ["run", str(self.recipe), "-o", f"{at}/run"], timed=("run/run.json",)),
            "bench": Job(
                lambda at: [
                    *("bench", str(self.moe), "--against", dense, "--data", str(self.text), "--overwrite"),
                    *("--skip", "speed", "--skip", "memory", "-o", f"{at}/bench"),
                ],
                timed=("bench/bench.json",),
            ),
            "builtin": Job(lambda _: ["inspect", "builtin"]),
        }


def prepare() -> None:
    """An embedded model that trains for seconds, and leftovers that are old at once."""
    from moeify import cache
    from moeify.models import builtin

    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "context": 64}
    builtin.BuiltinRecipe = partial(builtin.BuiltinRecipe, **small, steps=100, batch_size=4)  # type: ignore[misc]
    cache.GRACE_S = 0.0


@dataclass
class Stage:
    """Where one job is killed again and again."""

    job: Job
    folder: Path
    log: Path
    forking: Any

    def start(self) -> Any:
        self.folder.mkdir(exist_ok=True)
        environment = {"MOEIFY_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.run = Run(
            [*self.job.arguments(self.folder), "--quiet"], self.log, prepare=prepare, environment=environment
        )
        process = self.forking.Process(target=main, args=(self.run,))
        process.start()
        return process

    def finish(self) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        process = self.start()
        process.join(DEADLINE_S)
        assert process.exitcode == 0, self.run.errors
        return time.monotonic() - began

    def kill(self, seconds: float) -> bool:
        """False if it was through before."""
        process = self.start()
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.run.errors
        return bool(process.exitcode)

    def files(self) -> dict[str, str]:
        """Hash of every file by name, but for TensorBoard's; "timed" for one that holds times."""
        return {
            name: "timed" if name in self.job.timed else digest
            for name, digest in tree(self.folder).items()
            if not fnmatch(name, EVENTS)
        }

    def check_whole(self, expected: dict[str, str]) -> None:
        """Whatever has its final name is what an uninterrupted run leaves, and a folder is so as a whole."""
        finished = {
            name: digest
            for name, digest in self.files().items()
            if not any(fnmatch(name, pattern) or fnmatch(f"/{name}", pattern) for pattern in UNFINISHED)
        }
        wrong = [name for name, digest in finished.items() if expected.get(name) != digest]
        assert not wrong
        for name, digest in finished.items():
            if digest == "timed":
                json.loads((self.folder / name).read_text())
        # A folder that appears at once has all of its files.
        for record in (name for name in finished if Path(name).name in ("moeify.json", "tokenizer.json")):
            beside = [name for name in expected if Path(name).is_relative_to(Path(record).parent)]
            assert [name for name in beside if name not in finished] == []


@pytest.fixture(scope="module")
def sources(make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    from moeify import SplitOptions, split

    dense = make_dense("llama", num_hidden_layers=4)
    moe = tmp_path_factory.mktemp("killed") / "moe"
    split(str(dense), moe, SplitOptions(calibration=(str(calibration_file),), tokens=1024))
    return Sources(dense, moe, calibration_file)


@pytest.mark.stress
@pytest.mark.parametrize("name", ["split", "search", "compare", "finetune", "run", "bench", "builtin"])
def test_kills_at_random_moments(sources: Sources, tmp_path: Path, forking: Any, name: str) -> None:
    generator = random.Random(f"{name} {SEED}")
    stage = Stage(sources.jobs()[name], tmp_path / "work", tmp_path / "log", forking)
    # The first one also imports what a forked process does not have yet.
    stage.finish()
    expected, kinds = stage.files(), [0, 0]
    shutil.rmtree(stage.folder)
    seconds = stage.finish()
    assert stage.files() == expected, "it does not even repeat itself"
    shutil.rmtree(stage.folder)
    kills = 0
    while kills < KILLS:
        hit = stage.kill(generator.uniform(0, seconds))
        kills += hit
        stage.check_whole(expected)
        again = hit and kills < KILLS and generator.random() < 0.4
        kinds[again] += hit
        if again:
            continue
        # Killed behind its last step, when an empty lock alone may be left: there is nothing to go on with.
        if hit and not expected.items() <= stage.files().items():
            stage.finish()
            hit = False
        left = {name for name in stage.files() if not (hit and fnmatch(name, "*.lock"))}
        assert left == expected.keys()
        assert expected.items() <= stage.files().items()
        shutil.rmtree(stage.folder)
    print(f"\n{name}: {kills} kills in a run of {seconds:.1f} s, {kinds[0]} resumed at once, {kinds[1]} killed again")  # noqa: T201
