"""`moeify` in a process that need not import anything: what tests start where the process itself matters.

`forking` of conftest.py makes such processes:

    run = Run(["split", "model"], tmp_path / "log")
    process = forking.Process(target=main, args=(run,))
"""

import hashlib
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One process.

    Args:
        arguments: of `moeify`.
        log: what it prints goes to this file; its errors to one that ends in `.err` instead.
        folder: where it works; None is where the tests do.
        prepare: called before the command; a function of a module, or a partial of one.
    """

    arguments: list[str]
    log: Path
    folder: Path | None = None
    prepare: Callable[[], None] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text()


def main(run: Run) -> None:
    """The target of the process."""
    for number, path in ((1, run.log), (2, run.log.with_suffix(".err"))):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(run.environment)
    if run.folder:
        os.chdir(run.folder)
    if run.prepare:
        run.prepare()
    from moeify.cli.app import run_command

    sys.exit(run_command(run.arguments))


def train_briefly() -> None:
    """Have the embedded models trained for a part of their steps: worse ones, in all else the same."""
    from moeify.models import builtin, builtin_vit

    for module, name, steps in ((builtin, "BuiltinRecipe", 400), (builtin_vit, "VitRecipe", 70)):
        recipe = getattr(module, name)
        setattr(module, name, partial(recipe, steps=steps, warmup_steps=steps // 5))


def die_at(module: str, name: str, count: int) -> None:
    """Have this process kill itself at that call of a function."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    really, calls = getattr(owner, last), 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(*arguments, **named)

    setattr(owner, last, call)


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
