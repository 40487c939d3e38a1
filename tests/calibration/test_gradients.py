"""Gradients of the loss by every FFN's output: against differences, and which of the text they are of."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moeify import partition
from moeify.calibration import gradients
from moeify.calibration.gradients import output_gradients
from moeify.convert.pipeline import split
from moeify.models.dense import open_dense
from moeify.options import SplitOptions


def ids(num_blocks: int, context: int) -> torch.Tensor:
    return torch.randint(384, (num_blocks, context), generator=torch.Generator().manual_seed(0))


@contextmanager
def moved(model: Any, layer: int, shift_1CD: torch.Tensor) -> Iterator[None]:
    """Add something to what one FFN puts out."""
    handle = model.model.layers[layer].mlp.register_forward_hook(lambda _, __, output: output + shift_1CD)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_they_are_what_differences_say(family: str, make_dense: MakeDense) -> None:
    folder, ids_BC = make_dense(family, num_hidden_layers=3), ids(2, 24)
    found = output_gradients(open_dense(str(folder)), ids_BC, "cpu")
    assert [(g.shape, g.dtype) for g in found] == [(torch.Size([48, 32]), torch.float32)] * 3
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    @torch.no_grad()
    def loss(block: int, layer: int, shift_1CD: torch.Tensor) -> float:
        with moved(model, layer, shift_1CD):
            logits_CV = model(ids_BC[block : block + 1]).logits[0]
        return float(cross_entropy(logits_CV[:-1], ids_BC[block, 1:], reduction="sum"))

    generator = torch.Generator().manual_seed(1)
    for layer, gradient_GD in enumerate(found):
        for block in (0, 1):
            direction_1CD = torch.randn(1, 24, 32, generator=generator, dtype=torch.float64)
            # Not smaller: the library's norms compute in float32 whatever they are given.
            step = 1e-3 * direction_1CD
            difference = (loss(block, layer, step) - loss(block, layer, -step)) / 2e-3
            expected = float((gradient_GD.view(2, 24, 32)[block].double() * direction_1CD[0]).sum())
            assert difference == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_only_the_first_blocks_are_used(make_dense: MakeDense, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, ids_BC = open_dense(str(make_dense("llama"))), ids(5, 16)
    whole = output_gradients(dense, ids_BC, "cpu")
    for limit, num_blocks in ((40, 2), (1, 1)):
        monkeypatch.setattr(gradients, "GRADIENT_TOKENS", limit)
        for some, everything in zip(output_gradients(dense, ids_BC, "cpu"), whole, strict=True):
            assert torch.equal(some, everything[: num_blocks * 16])


def test_methods_that_need_them_say_so() -> None:
    assert [name for name in partition.names() if partition.needs_gradients(name)] == ["gradient"]


@pytest.mark.parametrize("name", ["gradient", "routed"])
def test_a_split_takes_them_only_for_a_method_that_asks(
    name: str, make_dense: MakeDense, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.Tensor] = []

    def counted(dense: Any, ids_BC: torch.Tensor, device: str) -> list[torch.Tensor]:
        asked.append(ids_BC)
        return output_gradients(dense, ids_BC, device)

    monkeypatch.setattr(importlib.import_module("moeify.convert.pipeline"), "output_gradients", counted)
    options = {"tokens": 1024, "calibration": (str(calibration_file),)}
    split(str(make_dense("llama")), tmp_path / "out", SplitOptions(partition=name, **options))
    assert len(asked) == (name == "gradient")
    # A saved plan has its partition already.
    split(str(make_dense("llama")), tmp_path / "again", SplitOptions(plan=str(tmp_path / "out"), **options))
    assert len(asked) == (name == "gradient")
