"""The GPU benchmark runs, on tiny models without a GPU: what it measures is there, and what fails is reported."""

import json
from pathlib import Path
from typing import Any

import benchmark_kernels
import pytest

TINY = ["--device", "cpu", "--size", "tiny"]


def run(part: str, out: Path, *options: str) -> dict[str, Any]:
    assert benchmark_kernels.main([part, "--out", str(out), *TINY, *options]) == 0
    assert not list(out.glob("*.tmp"))
    return dict(json.loads((out / f"{part}.json").read_text()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    found = run("model", tmp_path_factory.mktemp("model"))
    assert found["schema"] == "moeify.kernel-benchmark/1"
    return list(found["rows"])


def test_implementations_give_the_same_tokens(rows: list[dict[str, Any]]) -> None:
    new_tokens = benchmark_kernels.NEW_TOKENS["tiny"]
    assert not any("failure" in row for row in rows)
    for family in ("llama", "qwen3"):
        texts = [row for row in rows if row["family"] == family and "same_tokens" in row]
        assert {row["implementation"] for row in texts} == {"grouped_mm", "moeify", "batched_mm"}
        assert {(row["mode"], row["batch"]) for row in texts} == {("graph", 1), ("generate", 1), ("graph", 2)}
        assert all(row["same_tokens"] == new_tokens and row["logit_difference"] < 1e-5 for row in texts)
        assert all(len(row["tokens"][0]) == new_tokens for row in texts)
        # That of `generate` is a difference of two times, and two steps of a tiny model are shorter than noise.
        assert all(row["ms_per_step"] > 0 or row["mode"] == "generate" for row in texts)


def test_dense_and_static_models_are_measured_beside_them(rows: list[dict[str, Any]]) -> None:
    sizes = {(row["family"], row["implementation"], row["active_share"]): row["parameters"] for row in rows}
    for family in ("llama", "qwen3"):
        whole, half = sizes[family, "dense", 1.0], sizes[family, "dense", 0.5]
        assert half < whole < sizes[family, "moeify", 0.5] < 1.02 * whole
    assert all(row["ms"] > 0 for row in rows if row["part"] == "prefill")


def test_equal_tokens_are_counted_from_the_first() -> None:
    assert benchmark_kernels.same_length([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == 3
    assert benchmark_kernels.same_length([[1, 2, 3], [4, 0, 6]], [[1, 2, 3], [4, 5, 6]]) == 1


@pytest.mark.parametrize("part", ["layers", "liger"])
def test_layer_parts(part: str, tmp_path: Path) -> None:
    found = run(part, tmp_path, "--peers", "dense,grouped_mm")
    assert found["schema"] == "moeify.layer-bench/1"
    assert found["not_run"] == []
    assert {row["peer"]: row["status"] for row in found["rows"]} == {"dense": "ok", "grouped_mm": "ok"}
    assert {row["routing"] for row in found["rows"]} == ({"uniform"} if part == "liger" else {"uniform", "zipf"})


def test_launches_are_tuned_and_reported(tmp_path: Path) -> None:
    rows = run("tune", tmp_path)["rows"]
    assert [row["key"] for row in rows] == ["single_up/1", "single_down/1/narrow"]
    assert all(row["tried"] > 10 and 0 < row["after_us"] <= row["before_us"] for row in rows)
