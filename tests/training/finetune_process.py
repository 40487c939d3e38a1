"""`moeify finetune` in a process of its own, which dies or is told that it shards; for test_finetune_runs.py."""

import importlib
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One process.

    Args:
        log: what it prints goes to this file, and with `.err` behind its name, its errors.
        killed_at: (module, function, count): it kills itself at that call of the function.
        is_sharded: as `accelerate launch --use_fsdp --fsdp_version 2` starts it.
    """

    arguments: list[str]
    log: Path
    killed_at: tuple[str, str, int] | None = None
    is_sharded: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text()


def main(run: Run) -> None:
    """The target of the process."""
    for stream, path in ((sys.stdout, run.log), (sys.stderr, run.log.with_suffix(".err"))):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(run.environment)
    if run.killed_at:
        _die_at(*run.killed_at)
    if run.is_sharded:
        _shard()
    from moeify.cli.app import run_command

    sys.exit(run_command(run.arguments))


def _die_at(module: str, name: str, count: int) -> None:
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


def _shard() -> None:
    """accelerate shards on accelerators alone, so it is told that it runs on some; tensors stay on the CPU."""
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
