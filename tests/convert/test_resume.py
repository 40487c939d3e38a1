"""A split that is killed at any moment goes on with the same command, to the folder that an uninterrupted one gives.

pytest tests/convert/test_resume.py -s            # also prints what each kill hit
pytest tests/convert/test_resume.py -s -m stress  # twenty kills while a model of 60 MB is converted
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_process import Run, main, tree
from conftest import MakeDense

LAYERS = 4
DEADLINE_S = 300

# `moeify` in a process that starts quickly: for each line "NUMBER FOLDER ARGUMENTS..." it forks, the child runs the
# command and is killed right before its NUMBERth change to something below the folder; 0 kills none. Answers
# with "EXIT EVENTS LAST-EVENT". The first line is run without a fork, so that no child has to import anything.
SERVER = """
import os, signal, sys
shard_bytes = int(sys.argv[1])
from moeify.export import writer
from moeify.cli.app import run_command
writer.SHARD_BYTES = shard_bytes
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}

def child(number, arguments, parent, pipe):
    count = 0
    def hook(event, details):
        nonlocal count
        if event not in EVENTS or not str(details[0]).startswith(parent):
            return
        if event == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR):
            # A kill before a look is a kill after the change before it.
            return
        count += 1
        if count == number:
            os.write(pipe, f"{count} {event} {' '.join(map(str, details[:2]))}".encode())
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    code = run_command(arguments)
    os.write(pipe, f"{count} done".encode())
    os._exit(code)

warm = False
for line in sys.stdin:
    number, parent, *arguments = line.rstrip("\\n").split("\\t")
    if not warm:
        warm = True
        print(run_command(arguments), "0 warm", flush=True)
        continue
    ours, theirs = os.pipe()
    process = os.fork()
    if process == 0:
        child(int(number), arguments, parent, theirs)
    os.close(theirs)
    said = os.read(ours, 10000).decode()
    os.close(ours)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(code, said, flush=True)
"""


def take_time(shard_bytes: int, pause: float) -> None:
    """Small shards, and a pause before each file gets its final name: a tiny model would be through before a kill."""
    from moeify import cache
    from moeify.export import writer

    really_sync = cache.sync

    def sync(path: Path) -> None:
        time.sleep(pause)
        really_sync(path)

    writer.SHARD_BYTES = shard_bytes
    cache.sync = sync


def stage(out: Path) -> str:
    """What a process that writes `out` is at, from what is there."""
    partial = out.with_name(f"{out.name}.partial")
    names = [str(path.relative_to(partial)) for path in partial.rglob("*")] if partial.exists() else []
    # The weights' library writes under a random name of its own first.
    writing = next((name for name in names if name.endswith(".tmp") or "/.tmp" in f"/{name}"), "")
    layers = sum(name.startswith("work/layer-") and name != writing for name in names)
    shards = sum(name.startswith("model-") and name != writing for name in names)
    if out.exists():
        return "done"
    if writing.startswith("work/"):
        return f"inside layer {layers}"
    if writing.startswith(("model-", ".tmp")):
        return f"inside shard {shards}"
    if "model.safetensors.index.json" in names:
        return "after shards, all"
    if shards:
        return f"after shards, {shards}"
    return f"after layers, {layers}" if layers else "before layers"


def finished_files(out: Path) -> int:
    """How many files of the result, or of the work towards it, have their final name."""
    partial = out.with_name(f"{out.name}.partial")
    return sum(path.is_file() and ".tmp" not in path.name for path in partial.rglob("*")) if partial.exists() else 0


@dataclass
class Killer:
    """Starts the command again and again and kills it at random moments until it has been killed often enough."""

    arguments: list[str]
    out: Path
    shard_bytes: int
    pause: float
    log: Path
    forking: Any

    def __post_init__(self) -> None:
        self.command = Run(self.arguments, self.log, prepare=partial(take_time, self.shard_bytes, self.pause))

    def start(self) -> Any:
        process = self.forking.Process(target=main, args=(self.command,))
        process.start()
        return process

    def finish(self) -> None:
        process = self.start()
        process.join(DEADLINE_S)
        assert process.exitcode == 0, self.command.errors

    def kill(self, files: int, seconds: float, *, writing: bool) -> str:
        """Kill it so long after it has finished so many files (or begun, if that is none); what that hit.

        Args:
            writing: wait until it has begun a further file, too.
        """
        before = self._began()
        process = self.start()
        deadline = time.monotonic() + DEADLINE_S
        while process.is_alive() and self._began() == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        while process.is_alive() and not self.out.exists():
            assert time.monotonic() < deadline
            if finished_files(self.out) >= files and (not writing or "inside" in stage(self.out)):
                break
            time.sleep(0.001)
        process.join(seconds)
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
        found = stage(self.out)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.command.errors
        return found

    def _began(self) -> int:
        """Changes as soon as a run has taken over what an earlier one left."""
        job = self.out.with_name(f"{self.out.name}.partial") / "job.json"
        with contextlib.suppress(FileNotFoundError):
            return job.stat().st_mtime_ns
        return 0


def kill_often(killer: Killer, times: int, expected: dict[str, str], seed: int) -> list[str]:
    """Kill it again and again, after each kill a few files further on, in several conversions if one does not suffice.

    Returns what each kill hit; the last run has ended by itself.
    """
    generator = random.Random(seed)
    stages: list[str] = []
    for _ in range(5 * times):
        done = finished_files(killer.out)
        files, writing = done + generator.randint(0, 1 + len(expected) // 4), generator.random() < 0.5
        stages.append(killer.kill(files, generator.uniform(0, 0.01 if writing else 0.2), writing=writing))
        if killer.out.exists():
            # It was through already.
            stages.pop()
            assert tree(killer.out) == expected
            shutil.rmtree(killer.out)
        if len(stages) == times:
            break
    killer.finish()
    kinds = Counter(stage.split(",")[0].rstrip(" 0123456789") for stage in stages)
    print(f"\nkilled at: {'; '.join(stages)}\nin short: {dict(kinds)}")  # noqa: T201
    return stages


@pytest.fixture(scope="module")
def convert(make_dense: MakeDense, calibration_file: Path) -> Callable[..., list[str]]:
    """convert(out, **config) -> arguments of `moeify split`."""

    def arguments(out: Path, *more: str, **config: Any) -> list[str]:
        model = make_dense("llama", **{"num_hidden_layers": LAYERS, "max_position_embeddings": 64, **config})
        text = ["--calibration", str(calibration_file), "--tokens", "1024"]
        return ["split", str(model), "-o", str(out), "--quiet", *text, *more]

    return arguments


@pytest.fixture
def kill(
    convert: Callable[..., list[str]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, forking: Any
) -> Callable[..., list[str]]:
    """kill(times, shard_bytes=..., pause=..., **config): kill, go on, compare; what each kill hit."""

    log = tmp_path_factory.mktemp("logs") / "log"

    def run(times: int, *, shard_bytes: int, pause: float, seed: int, **config: Any) -> list[str]:
        reference, killed = (
            Killer(convert(tmp_path / name, **config), tmp_path / name, shard_bytes, pause, log, forking)
            for name in ("whole", "out")
        )
        reference.finish()
        expected = tree(reference.out)
        stages = kill_often(killed, times, expected, seed)
        assert len(stages) == times
        assert tree(killed.out) == expected
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
        return stages

    return run


def test_four_kills_at_random_moments(kill: Callable[..., list[str]]) -> None:
    kill(4, shard_bytes=30_000, pause=0.05, seed=0)


@pytest.mark.stress
def test_twenty_kills_of_a_larger_model(kill: Callable[..., list[str]]) -> None:
    """No pauses: what takes time is the work itself, the writing of shards among it."""
    size = {"hidden_size": 256, "intermediate_size": 4096, "vocab_size": 4096}
    stages = kill(20, shard_bytes=8_000_000, pause=0, seed=1, **size)
    assert any("layer" in stage for stage in stages)
    assert any("shard" in stage for stage in stages)
    assert len(set(stages)) >= 8


@dataclass
class Server:
    """The quick starter; see SERVER."""

    process: "subprocess.Popen[str]"

    def run(self, arguments: list[str], parent: Path, kill_at: int = 0) -> tuple[int, int, str]:
        """(exit code, changes made, the last one); killed right before the change of that number."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("\t".join([str(kill_at), str(parent), *arguments]), file=self.process.stdin, flush=True)
        code, count, last = self.process.stdout.readline().rstrip("\n").split(" ", 2)
        return int(code), int(count), last


@pytest.fixture(scope="module")
def server(convert: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [sys.executable, "-c", SERVER, "30000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        started = Server(process)
        warm = tmp_path_factory.mktemp("warm")
        assert started.run(convert(warm / "out", num_hidden_layers=2), warm)[0] == 0
        yield started
        assert process.stdin is not None
        process.stdin.close()


def killed_at(
    server: Server, arguments: list[str], folder: Path, numbers: Iterable[int], prepare: Callable[[], None]
) -> Iterator[tuple[int, str]]:
    """Kill a fresh run right before each of these changes to the disk."""
    for number in numbers:
        prepare()
        code, count, last = server.run(arguments, folder, number)
        assert (code, count) == (-signal.SIGKILL, number), last
        yield number, last


def test_a_kill_before_any_change_to_the_disk(
    convert: Callable[..., list[str]], server: Server, tmp_path: Path
) -> None:
    """Every one of them, from the lock to the removal of the lock: the next run gives the same folder."""
    folder = tmp_path / "work"
    out = folder / "out"
    arguments = convert(out, num_hidden_layers=2)

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    clear()
    code, total, _ = server.run(arguments, folder)
    assert code == 0
    assert total > 30
    reference = tree(out)
    assert len([name for name in reference if name.startswith("model-")]) >= 3
    wrong = []
    for number, last in killed_at(server, arguments, folder, range(1, total + 1), clear):
        if out.exists():
            # Killed after the folder had its name: it is whole.
            code = 0
        else:
            code, _, _ = server.run(arguments, folder)
        same = out.exists() and tree(out) == reference
        alone = {path.name for path in folder.iterdir()} <= {"out", ".out.lock"}
        if code or not same or not alone:
            wrong.append((number, last, code, same, sorted(path.name for path in folder.iterdir())))
    assert not wrong


def test_a_kill_while_a_former_result_is_replaced(
    convert: Callable[..., list[str]], server: Server, tmp_path: Path
) -> None:
    """At every moment the old result or the new one is there, whole; the next run with --overwrite gives the new."""
    folder = tmp_path / "work"
    out = folder / "out"
    old = convert(out, "--experts", "4", num_hidden_layers=2)
    new = convert(out, "--overwrite", num_hidden_layers=2)

    def clear() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)

    folder.mkdir()
    assert server.run(old, folder)[0] == 0
    out.rename(tmp_path / "old")
    expected_old = tree(tmp_path / "old")
    code, total, _ = server.run(new, folder)
    assert code == 0
    expected_new = tree(out)
    # The old result is in danger only when the new one takes its place.
    numbers = [*range(1, 5), *range(total - 15, total + 1)]
    wrong = []
    for number, last in killed_at(server, new, folder, numbers, clear):
        held = {path.name: tree(path) for path in folder.iterdir() if path.is_dir()}
        whole = expected_old in held.values() or held.get("out") == expected_new
        code, _, _ = server.run(new, folder)
        same = out.exists() and tree(out) == expected_new
        alone = {path.name for path in folder.iterdir()} <= {"out", ".out.lock"}
        if code or not whole or not same or not alone:
            wrong.append((number, last, code, whole, same, sorted(path.name for path in folder.iterdir())))
    assert not wrong


def test_kills_with_dense_layers_and_a_refit_to_the_stream(
    convert: Callable[..., list[str]], server: Server, tmp_path: Path
) -> None:
    """Moments drawn with a seed; a layer that stays dense is replayed like the others."""
    folder = tmp_path / "work"
    out = folder / "out"
    arguments = convert(out, "--dense-layers", "0,2", "--refit-to", "stream")
    folder.mkdir()
    code, total, _ = server.run(arguments, folder)
    assert code == 0
    reference = tree(out)
    for number in sorted(random.Random(1).sample(range(5, total - 5), 6)):
        shutil.rmtree(folder)
        folder.mkdir()
        assert server.run(arguments, folder, number)[0] == -signal.SIGKILL
        assert server.run(arguments, folder)[0] == 0, number
        assert tree(out) == reference, number


def test_two_kills_of_the_same_run(convert: Callable[..., list[str]], server: Server, tmp_path: Path) -> None:
    """Of the run that goes on, too: pairs of moments, drawn with a seed."""
    folder = tmp_path / "work"
    out = folder / "out"
    arguments = convert(out, num_hidden_layers=2)
    folder.mkdir()
    _, total, _ = server.run(arguments, folder)
    reference = tree(out)
    generator = random.Random(0)
    for _ in range(6):
        shutil.rmtree(folder)
        folder.mkdir()
        killed = [server.run(arguments, folder, generator.randrange(2, total * 2 // 3)) for _ in range(2)]
        assert killed[0][0] == -signal.SIGKILL
        code = killed[1][0] if out.exists() else server.run(arguments, folder)[0]
        assert code == 0, killed
        assert tree(out) == reference, killed
