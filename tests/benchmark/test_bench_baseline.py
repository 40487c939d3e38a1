"""The gate against an earlier result: worse is past threshold and noise; what cannot be compared is said."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.models import baseline
from moeify.benchmark.models.results import LayerExperts, Model, ModelBench, Part, Quality, Regressions, Speed, Verdict
from moeify.benchmark.models.run import check_folder, load_bench
from moeify.errors import InputError, UsageError
from moeify.results import write


def model(name: str, **changes: Any) -> Model:
    values: dict[str, Any] = {"path": name, "kind": "moe", "model_type": "mixtral", "num_layers": 2, "num_shared": 0}
    values |= {"num_experts": 8, "num_active": 4, "active_share": 0.5, "bytes_on_disk": 1000}
    values["parts"] = {"ffn": Part(200, 100, 200, 400), "attention": Part(50, 50, 100, 200)}
    return Model(name=name, **{**values, **changes})


def quality(name: str, ratio: float, **changes: Any) -> Quality:
    found = Quality(name, "text.txt", 512, 9.0, 8.0, 10.0, ratio, ratio - 0.01, ratio + 0.01, 0.1, 0.09, 0.11, 0.9)
    return dataclasses.replace(found, **changes)


def speed(name: str, ratio: float | None, **changes: Any) -> Speed:
    interval = {} if ratio is None else {"time_over_dense_low": ratio - 0.01, "time_over_dense_high": ratio + 0.01}
    values: dict[str, Any] = {"ms_p50": 5.0, "time_over_dense": ratio, **interval}
    return dataclasses.replace(Speed(name, "eager", "decode", 1, 64), **{**values, **changes})


def bench(**changes: Any) -> ModelBench:
    values: dict[str, Any] = {
        "models": [model("dense", kind="dense"), model("moe")],
        "quality": [quality("dense", 1.0), quality("moe", 1.2)],
        "speed": [speed("dense", None), speed("moe", 1.5)],
    }
    head = {"date": "2026-01-01", "command": "", "machine": {"device": "cpu"}, "versions": {"torch": "2"}}
    return ModelBench(**head, dtype="float32", context=64, **{**values, **changes})


def compared(new: ModelBench, old: ModelBench, threshold: float = 1.05) -> Regressions:
    return baseline.compare(new, old, "old.json", threshold)


def test_an_equal_result_is_no_worse() -> None:
    found = compared(bench(), bench(), threshold=1.0)
    assert found.worse == []
    assert found.missing == ()
    assert {change.ratio for change in found.changes} == {1.0}
    whats = {change.what for change in found.changes}
    assert whats == {"parameters", "active parameters", "bytes on disk", "perplexity over dense", "time over dense"}


def test_a_slower_result_is_worse() -> None:
    (worse,) = compared(bench(speed=[speed("dense", None), speed("moe", 1.8)]), bench()).worse
    assert (worse.what, worse.old, worse.new) == ("time over dense", 1.5, 1.8)
    assert worse.ratio == pytest.approx(1.2)
    assert "moe, eager, decode 1 x 64, float32" in worse.row
    assert compared(bench(speed=[speed("moe", 1.8)]), bench(), threshold=1.25).worse == []
    # Faster is no regression.
    assert compared(bench(speed=[speed("moe", 0.5)]), bench()).worse == []


def test_what_noise_explains_is_not_worse() -> None:
    noisy = speed("moe", 1.8, time_over_dense_low=1.5)
    assert compared(bench(speed=[noisy]), bench()).worse == []
    clear = speed("moe", 1.8, time_over_dense_low=1.52)
    assert len(compared(bench(speed=[clear]), bench()).worse) == 1
    old = bench(speed=[speed("moe", 1.5, time_over_dense_high=1.8)])
    assert compared(bench(speed=[speed("moe", 1.8)]), old).worse == []


def test_worse_text_and_larger_models_are_worse() -> None:
    (worse,) = compared(bench(quality=[quality("moe", 1.4)]), bench()).worse
    assert (worse.what, "512 tokens of text.txt in blocks of 64" in worse.row) == ("perplexity over dense", True)
    (infinite,) = compared(bench(quality=[quality("moe", math.inf)]), bench()).worse
    assert infinite.ratio == math.inf
    larger = model("moe", parts={"ffn": Part(200, 150, 300, 600), "attention": Part(50, 50, 100, 200)})
    (worse,) = compared(bench(models=[model("dense"), larger]), bench()).worse
    assert (worse.what, worse.old, worse.new) == ("active parameters", 150, 200)
    (worse,) = compared(bench(models=[model("dense"), model("moe", bytes_on_disk=2000)]), bench()).worse
    assert worse.what == "bytes on disk"


def test_rows_that_only_one_has_are_named_or_left_out() -> None:
    batch8 = speed("moe", 1.5, batch=8)
    found = compared(bench(), bench(speed=[speed("moe", 1.5), batch8]))
    assert found.missing == ("moe, eager, decode 8 x 64, float32, time over dense",)
    assert compared(bench(speed=[speed("moe", 1.5), batch8]), bench()).missing == ()
    failed = dataclasses.replace(Speed("moe", "eager", "decode", 1, 64), reason="no memory")
    assert compared(bench(speed=[failed]), bench()).missing == ("moe, eager, decode 1 x 64, float32, time over dense",)
    # Other tokens, other blocks, another dtype: other rows.
    assert any(
        "256 tokens" in name for name in compared(bench(), bench(quality=[quality("moe", 1, num_tokens=256)])).missing
    )
    other = dataclasses.replace(bench(), dtype="bfloat16", context=32)
    assert len(compared(bench(), other).missing) == 2


def test_nothing_in_common_is_an_error() -> None:
    other = bench(models=[model("dense"), model("else")], quality=[quality("else", 1.0)], speed=[speed("else", 1.0)])
    with pytest.raises(InputError, match=r"no row in common.*it holds else, this run moe"):
        compared(bench(), other)


@pytest.mark.parametrize("threshold", [0.99, -1.0, math.nan])
def test_a_threshold_that_equal_results_would_fail_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        baseline.check_threshold(threshold)


def test_a_file_is_read_back_as_it_was(tmp_path: Path) -> None:
    layer = LayerExperts(0, (0.5, 0.5), ((0.0, 0.1), (0.1, 0.0)), 0.9, 0.5, (("a",), ("b", "c")))
    verdict = Verdict("moe", "eager", "decode", 1, 64, "slower", 1.5, "because")
    full = bench(experts={"moe": [layer]}, verdicts=[verdict], ceilings=Ceilings(1.0, 2.0, 3, "float32"))
    full.regressions = compared(full, bench(speed=[speed("moe", 1.0), speed("moe", 1.0, batch=8)]))
    for number, one in enumerate((full, bench())):
        folder = tmp_path / str(number)
        write(one, folder / "bench.json")
        assert load_bench(folder) == load_bench(folder / "bench.json") == one


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    write(bench(quality=[quality("moe", math.inf)]), tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["quality"][0]["ratio"] is None
    old = load_bench(tmp_path)
    assert [change.what for change in compared(bench(), old).changes].count("perplexity over dense") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("no json", "is not JSON"),
        ('{"schema": "moeify.layer-bench/1"}', "has schema moeify.layer-bench/1, expected moeify.bench/1"),
        ("[]", "has schema None"),
        ('{"schema": "moeify.bench/1", "models": []}', "date: Field required"),
    ],
)
def test_another_file_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_bench(file)
    assert "bench" in caught.value.hint


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        check_folder(tmp_path / "file", overwrite=False)
