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
    found = run("model", tmp_path_factory.mktemp("model"), "--implementations", "grouped_mm,eager,nothing")
    assert found["schema"] == "moeify.kernel-benchmark/1"
    return list(found["rows"])


def test_implementations_give_the_same_tokens_and_losses(rows: list[dict[str, Any]]) -> None:
    new_tokens = benchmark_kernels.NEW_TOKENS["tiny"]
    for model in ("granitemoeshared", "qwen3_moe"):
        found = [row for row in rows if row["model"] == model and "failure" not in row]
        texts = [row for row in found if row["part"] == "generate"]
        assert [(row["implementation"], row["mode"]) for row in texts] == [
            (name, mode) for name in ("grouped_mm", "eager") for mode in ("generate", "static cache")
        ]
        assert all(row["same_tokens"] == new_tokens and row["logit_difference"] < 1e-5 for row in texts)
        assert all(row["ms_per_step"] > 0 and len(row["tokens"][0]) == new_tokens for row in texts)
        reference, other = (row["losses"] for row in found if row["part"] == "training")
        assert other == pytest.approx(reference, rel=1e-4)
        assert reference[-1] < reference[0]


def test_the_dense_model_is_measured_beside_them(rows: list[dict[str, Any]]) -> None:
    dense = [row for row in rows if row["model"] == "llama"]
    assert {row["part"] for row in dense} == {"generate", "training"}
    sizes = {row["model"]: row["parameters"] for row in rows if "parameters" in row}
    assert max(sizes.values()) < 1.02 * min(sizes.values())


def test_an_implementation_that_fails_has_its_reason(rows: list[dict[str, Any]]) -> None:
    failed = [row for row in rows if row["implementation"] == "nothing"]
    assert len(failed) == 2
    assert all("nothing" in row["failure"] for row in failed)


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
    assert [row["key"] for row in rows] == ["decode_up/16", "decode_down/16"]
    assert all(row["tried"] > 20 and 0 < row["after_us"] <= row["before_us"] for row in rows)
    assert all(row["launch"]["rows"] == 16 for row in rows)
