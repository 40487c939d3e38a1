"""The commands on a GPU, on a small model that was really trained; where a CPU gives the same, it is the judge."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify.cli.app import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What torch's compiler and transformers say of a device is no concern of the commands.
    pytest.mark.filterwarnings("default"),
]

Call = Callable[..., dict[str, Any]]
LAYOUT = ["--experts", "8", "--active", "4"]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Call:
    """run(*arguments): the one object that a command prints with --json."""

    def call(*arguments: str | Path) -> dict[str, Any]:
        capfd.readouterr()
        code = run_command([*map(str, arguments), "--json"])
        out, err = capfd.readouterr()
        assert code == 0, err[-2000:]
        result: dict[str, Any] = json.loads(out)
        return result

    return call


@pytest.fixture(scope="module")
def text(calibration_file: Path) -> list[str]:
    return ["--calibration", str(calibration_file), "--tokens", "2048"]


@pytest.fixture(scope="module")
def splits(taught: Path, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same split on either device, and static pruning on the GPU."""
    folder = tmp_path_factory.mktemp("splits")
    words = {"cpu": ["--device", "cpu"], "gpu": ["--device", "cuda"], "static": ["--static", "--device", "cuda"]}
    for name, device in words.items():
        command = ["split", str(taught), *LAYOUT, *text, *device, "-o", str(folder / name), "--quiet"]
        assert run_command(command) == 0
    return {name: folder / name for name in words}


def perplexity(run: Call, model: Path, calibration_file: Path, device: str, *words: str) -> float:
    found = run("eval", model, "--data", calibration_file, "--tokens", "2048", "--device", device, *words)
    return float(found["results"][0]["perplexity"])


def test_a_split_is_as_good_as_that_of_a_cpu(run: Call, splits: dict[str, Path], calibration_file: Path) -> None:
    values = [perplexity(run, splits[name], calibration_file, "cpu") for name in ("cpu", "gpu")]
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_a_model_says_the_same_on_both(
    run: Call, splits: dict[str, Path], taught: Path, calibration_file: Path
) -> None:
    for model in (taught, splits["gpu"], splits["static"]):
        values = [perplexity(run, model, calibration_file, device) for device in ("cpu", "cuda")]
        assert values[1] == pytest.approx(values[0], rel=1e-3), model.name
    # The last of them.
    half = perplexity(run, splits["gpu"], calibration_file, "cuda", "--dtype", "bfloat16")
    assert half == pytest.approx(values[0], rel=0.05)


def test_verify_accepts_what_a_gpu_made(run: Call, splits: dict[str, Path], taught: Path) -> None:
    assert run("verify", splits["gpu"], "--dense", taught)["passed"] is True


@pytest.mark.parametrize("stages", [("layers", "full"), ("router",), ("lora",)], ids="+".join)
def test_training_lowers_perplexity(
    run: Call, splits: dict[str, Path], taught: Path, calibration_file: Path, stages: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    words = [word for stage in stages for word in ("--stage", stage)]
    words += ["--data", str(calibration_file), "--tokens", "8192", "--eval-data", str(calibration_file)]
    words += ["--eval-tokens", "1024", "--device", "cuda"]
    run("finetune", splits["gpu"], "--teacher", taught, *words, "-o", out)
    before, after = (perplexity(run, model, calibration_file, "cuda") for model in (splits["gpu"], out))
    # A few steps of routers alone change next to nothing.
    assert 1 < after < before * (1.01 if stages == ("router",) else 1)


def test_search_and_compare(run: Call, taught: Path, text: list[str], calibration_file: Path, tmp_path: Path) -> None:
    found = run("search", taught, "--experts", "8", *text, "--budget", "0.6", "--trials", "2", "--device", "cuda")
    assert found["schema"] == "moeify.search/1"
    words = ["--budget", "0.5", "--data", str(calibration_file), "--data-tokens", "1024"]
    found = run("compare", taught, *text, *words, "--method", "CMoE", "--device", "cuda")
    assert found["schema"] == "moeify.compare/1"


def test_bench_and_report(run: Call, splits: dict[str, Path], taught: Path, tmp_path: Path) -> None:
    words = ["--batch", "1", "--prompt", "32", "--seconds-per-row", "0.1", "--device", "cuda", "-o", tmp_path / "bench"]
    found = run("bench", splits["gpu"], "--against", taught, "--against", splits["static"], *words)
    failures = [row for row in found["speed"] if row.get("failure")]
    assert failures == []
    run("report", tmp_path / "bench")


def test_generate_gives_the_tokens_of_a_cpu(run: Call, splits: dict[str, Path], taught: Path) -> None:
    words = ["--prompt", "The module", "--tokens", "8"]
    for model in (taught, splits["gpu"]):
        results = [run("generate", model, *words, "--device", device) for device in ("cpu", "cuda")]
        assert results[0]["generations"][0]["text"] == results[1]["generations"][0]["text"]


def test_tune_keeps_launches_that_run(
    run: Call, splits: dict[str, Path], calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeify.kernels import launch

    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    launch.tuned.cache_clear()
    try:
        found = run("tune", splits["gpu"], "--tokens", "1", "--no-backward")
        assert Path(found["file"]).is_file()
        assert perplexity(run, splits["gpu"], calibration_file, "cuda", "--dtype", "bfloat16") > 1
    finally:
        launch.tuned.cache_clear()
