"""`moeify bench` and `moeify report` of encoders: of images by their classes, of texts by their features."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import MakeDense
from tiny_images import make_model
from torch import Tensor

from moeify.benchmark.models.memory import Memory
from moeify.benchmark.models.run import load_bench
from moeify.cli.app import run_command
from moeify.reporting.report import report

QUICK = ["--seconds-per-row", "0.001", "--device", "cpu", "--batch", "1,3", "--implementation", "eager"]


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, dict[str, tuple[int, ...]]]]:
    """What the process that measures memory would be asked for."""
    asked = []

    def measured(path: Path, inputs: Mapping[str, Tensor], *, writes: bool, dtype: str, device: str) -> Memory:
        asked.append((writes, {name: tuple(tensor.shape) for name, tensor in inputs.items()}))
        return Memory(1000, 2000)

    monkeypatch.setattr(importlib.import_module("moeify.benchmark.models.run"), "measure_memory", measured)
    return asked


def split(dense: Path, out: Path, *options: str) -> str:
    sizes = ["--experts", "4", "--active", "2", "--tokens", "1024", "--quiet"]
    assert run_command(["split", str(dense), *sizes, *options, "-o", str(out)]) == 0
    return str(out)


@pytest.mark.filterwarnings("ignore:.* handwritten digits", "ignore:task digits has")
def test_images(tmp_path: Path, memory: list[tuple[bool, dict[str, tuple[int, ...]]]]) -> None:
    """Numbers of experts differ by token in one of them; the report says what is left of the dense model's classes."""
    names = {number: str(number) for number in range(10)}
    dense = make_model(tmp_path / "vit", "vit", "ViTForImageClassification", id2label=names)
    moe = split(dense, tmp_path / "moe")
    adaptive = split(dense, tmp_path / "adaptive", "--min-active", "1")
    pruned = split(dense, tmp_path / "pruned", "--static")
    out, sizes = tmp_path / "out", ["--tokens", "340", "--questions", "120", *QUICK]
    against = ["--against", f"{dense},{pruned}"]
    assert run_command(["bench", moe, adaptive, *against, *sizes, "-o", str(out), "--quiet"]) == 0
    result = load_bench(out)
    assert result.context == 17
    assert memory == [(False, {"pixel_values": (3, 3, 16, 16)})] * 4
    assert [(row.model, row.measure, row.num_examples) for row in result.scores] == [
        (name, "feature cosine", 21) for name in ("dense", "moe", "adaptive", "pruned")
    ]
    assert result.scores[0].value == pytest.approx(1)
    assert 0 < result.scores[1].value < 1
    assert {row.metric for row in result.tasks} == {"accuracy", "agreement"}
    assert result.quality == result.samples == []
    _, fixed, own, _ = result.models
    assert fixed.mean_active is None
    # What ran for these images, and not the most that may.
    assert own.mean_active is not None
    assert 1 <= own.mean_active < own.num_active == 4
    assert own.active_share == pytest.approx(own.mean_active / 4, abs=0.02)
    assert own.parts["ffn"].active_parameters < own.parts["ffn"].parameters
    assert [(row.model, row.phase, row.batch, row.prompt_tokens, row.reason) for row in result.speed] == [
        (name, "forward", batch, 17, "") for batch in (1, 3) for name in ("dense", "moe", "adaptive", "pruned")
    ]
    for row in result.speed:
        assert row.examples_per_second == pytest.approx(1e3 * row.batch / (row.ms_p50 or 0))
        assert row.tokens_per_second == pytest.approx(17 * (row.examples_per_second or 0))
    shares = {name: [sum(layer.load) for layer in layers] for name, layers in result.experts.items()}
    assert shares == {name: pytest.approx([1, 1]) for name in ("moe", "adaptive")}
    assert all(0 < layer.oracle_capture <= 1 for layers in result.experts.values() for layer in layers)
    favourites = {token for tokens in result.experts["moe"][0].top_tokens for token in tokens}
    assert favourites <= {f"position {place}" for place in range(17)}
    assert len(favourites) > 1
    headline = report(out).headlines[0]
    agreement = next(row.score for row in result.tasks if (row.model, row.metric) == ("moe", "agreement"))
    assert headline.likeness == agreement
    assert headline.forward_speed is not None
    assert headline.answers.advice.level != "unknown"
    page = (out / "report.html").read_text()
    assert "feature cosine" in page
    assert "digits agreement" in page
    assert "perplexity</th>" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "8"), "an image has 17 positions"),
        (("--engine", "transformers,llama.cpp"), "llama.cpp is timed on language models"),
    ],
)
def test_images_have_neither_prompts_nor_llama_cpp(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.import_module("moeify.benchmark.models.run"), "check_engines", lambda _: None)
    dense = str(make_model(tmp_path / "vit", "vit", "ViTModel"))
    other = str(make_model(tmp_path / "other", "vit", "ViTModel"))
    assert run_command(["bench", other, "--against", dense, *options]) == 2
    assert message in capfd.readouterr().err


def test_texts(
    make_dense: MakeDense,
    calibration_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    memory: list[tuple[bool, dict[str, tuple[int, ...]]]],
) -> None:
    dense = make_dense("bert")
    moe = split(dense, tmp_path / "moe", "--calibration", str(calibration_file))
    capfd.readouterr()
    words = ["--data", str(calibration_file), "--tokens", "512", "--context", "32", "--prompt", "16", *QUICK, "--json"]
    assert run_command(["bench", moe, "--against", str(dense), *words]) == 0
    result = json.loads(capfd.readouterr().out)
    assert memory == [(False, {"input_ids": (3, 16)})] * 2
    assert [(row["model"], row["measure"]) for row in result["scores"]] == [
        ("dense", "feature cosine"),
        ("moe", "feature cosine"),
    ]
    assert {(row["phase"], row["prompt_tokens"]) for row in result["speed"]} == {("forward", 16)}
    assert result["experts"]["moe"][0]["top_tokens"]
