"""The pickles of a training state run nothing, and what cannot be read of one is an error with a hint."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moeify.errors import InputError
from moeify.training.states import reading
from moeify.training.trainer import FinetuneTrainer


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "")


class Trainer(FinetuneTrainer):
    """Reads states, and has nothing to train."""

    is_fsdp_enabled = is_deepspeed_enabled = is_fsdp_xla_v1_enabled = False

    def __init__(self) -> None:
        self.args: Any = SimpleNamespace(world_size=1, process_index=0, device="cpu")
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])


@pytest.mark.parametrize("kind", ["bomb", "plain bomb", "empty", "text", "another value"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_states_of_any_content(tmp_path: Path, kind: str, name: str) -> None:
    file, proof = tmp_path / name, tmp_path / "exploded"
    (tmp_path / "scheduler.pt").touch()
    if kind == "bomb":
        torch.save(Bomb(proof), file)
    elif kind == "another value":
        torch.save([1, 2], file)
    else:
        file.write_bytes({"plain bomb": pickle.dumps(Bomb(proof)), "empty": b"", "text": b"hello"}[kind])
    load = Trainer()._load_rng_state if name == "rng_state.pth" else Trainer()._load_optimizer_and_scheduler
    with pytest.raises(InputError, match=r"training state .* cannot be read") as caught:
        load(str(tmp_path))
    assert "remove that folder" in caught.value.hint
    assert not proof.exists()


def test_an_optimizer_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"optimizer\.pt"):
        Trainer()._load_optimizer_and_scheduler(str(tmp_path))


def test_a_run_without_a_state_reads_none() -> None:
    Trainer()._load_optimizer_and_scheduler(None)
    Trainer()._load_rng_state(None)


def test_weights_of_a_state_that_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "trained.safetensors").write_bytes(b"12345678")
    with pytest.raises(InputError, match="cannot be read"), reading(tmp_path):
        load_file(tmp_path / "trained.safetensors")
