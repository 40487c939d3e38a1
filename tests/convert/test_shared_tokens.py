"""Long texts: hidden states on a disk, and two processes that share the tokens, give the plan of one in memory."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from command_process import Run, main, tree
from conftest import MakeDense

from moeify.calibration import activations, store
from moeify.calibration.share import ALONE, Share
from moeify.convert import pipeline
from moeify.convert.estimate import place_of_text, text_bytes
from moeify.convert.prepare import prepare
from moeify.convert.text_size import text_need, warn_of_few_tokens
from moeify.errors import InputError, MoeifyWarning, UsageError
from moeify.models.dense import open_dense
from moeify.options import SplitOptions
from moeify.plan import LayerPlan, SplitPlan, load_plan

DEADLINE_S = 120


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", num_hidden_layers=2, intermediate_size=128)


def options(calibration_file: Path, **changed: Any) -> SplitOptions:
    return SplitOptions(**{"calibration": (str(calibration_file),), "tokens": 2048, "context": 64, **changed})


def close(one: SplitPlan, other: SplitPlan) -> None:
    """The same plan, but for the order in which numbers are added up."""
    for layer, again in zip(one.layers, other.layers, strict=True):
        assert torch.equal(layer.labels_F, again.labels_F)
        assert layer.router_RD is not None
        assert again.router_RD is not None
        torch.testing.assert_close(again.router_RD, layer.router_RD, rtol=1e-3, atol=1e-4)
        assert again.diagnostics == pytest.approx(dict(layer.diagnostics), rel=1e-3)


@pytest.mark.parametrize("router", ["ridge", "membership"])
def test_two_processes_decide_what_one_does(
    router: str, dense: Path, calibration_file: Path, tmp_path: Path, forking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = ["--calibration", str(calibration_file), "--tokens", "2048", "--context", "64", "--router", router]
    arguments = ["split", str(dense), *flags, "-o", str(tmp_path / "two")]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [Run(arguments, tmp_path / rank, environment={**place, "RANK": rank}) for rank in "01"]
    processes = [forking.Process(target=main, args=(run,)) for run in runs]
    for process in processes:
        process.start()
    one = pipeline.split(str(dense), tmp_path / "one", options(calibration_file, router=router))
    for process in processes:
        process.join(DEADLINE_S)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0], "".join(run.errors for run in runs)
    # The first one speaks.
    assert [run.log.read_text().count("moeify split") for run in runs] == [1, 0]
    close(one.plan, load_plan(tmp_path / "two"))


@pytest.mark.parametrize("changed", [{}, {"refit_to": "stream"}, {"router": "membership"}])
def test_hidden_states_on_a_disk_are_as_good(
    changed: dict[str, Any], dense: Path, calibration_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    plans = [
        pipeline.split(
            str(dense),
            tmp_path / place,
            options(calibration_file, hidden_states=place, **changed),
            announce=said.append,
        ).plan
        for place in ("memory", "disk")
    ]
    assert [plan.calibration.get("hidden_states") for plan in plans] == [None, "bfloat16"]
    assert [line[:33] for line in said] == ["the hidden states of 2,048 tokens"]
    errors = [sum(layer.diagnostics["error_with_refit"] for layer in plan.layers) for plan in plans]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert not [path for path in (tmp_path / "disk").iterdir() if "token" in path.name and path.suffix == ".tmp"]


def test_a_run_that_goes_on_holds_them_where_it_began(
    dense: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory there is now: to the same bytes."""
    chosen = options(calibration_file)
    monkeypatch.setattr(pipeline, "place_of_text", lambda *_: "disk")
    whole = pipeline.split(str(dense), tmp_path / "whole", chosen)

    def stopped(items: Any, label: str, _: int) -> Any:
        for number, item in enumerate(items):
            if label == "splitting layers" and number == 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        pipeline.split(str(dense), tmp_path / "again", chosen, track=stopped)
    monkeypatch.setattr(pipeline, "place_of_text", lambda *_: "memory")
    resumed = pipeline.split(str(dense), tmp_path / "again", chosen)
    assert resumed.plan.calibration["hidden_states"] == "bfloat16"
    assert tree(resumed.out) == tree(whole.out)


def test_the_disk_is_taken_where_memory_is_short(
    dense: Path, calibration_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(open_dense(str(dense)), options(calibration_file))
    needed = text_bytes(prepared)
    assert text_bytes(prepare(prepared.dense, options(calibration_file, tokens=4096))) == 2 * needed
    for free, place in ((2 * needed, "memory"), (2 * needed - 2, "disk")):
        monkeypatch.setattr("moeify.convert.estimate.available_memory", lambda free=free: free)
        assert place_of_text(prepared, needed) == place


def test_stretches_change_sums_by_rounding_alone(
    dense: Path, calibration_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.split(str(dense), tmp_path / "whole", options(calibration_file))
    monkeypatch.setattr(store, "STRETCH_TOKENS", 300)
    monkeypatch.setattr(activations, "KEEP_BYTES", 0)
    close(whole.plan, pipeline.split(str(dense), tmp_path / "parts", options(calibration_file)).plan)


def test_parts_are_all_blocks_in_order() -> None:
    ids_BC = torch.arange(2 * 19).view(19, 2)
    parts = [Share(rank, 3).part(ids_BC) for rank in range(3)]
    assert torch.equal(torch.cat(parts), ids_BC)
    assert {len(part) for part in parts} <= {6, 7}
    # Enough for everyone: whole chunks.
    long_BC = torch.zeros(20, 1024)
    assert [len(Share(rank, 2).part(long_BC)) for rank in range(2)] == [8, 12]
    with pytest.raises(UsageError, match="19 blocks of 2 calibration tokens cannot be shared by 20 processes"):
        Share(0, 20).part(ids_BC)


def test_alone_nothing_is_added_up() -> None:
    values = torch.ones(3)
    assert ALONE.sum(values) is values is ALONE.max(values) is ALONE.gather(values)
    assert ALONE.place(5) == (0, 5)
    with pytest.raises(InputError, match="no"):
        ALONE.first(lambda: (_ for _ in ()).throw(InputError("no", "")))


def layer(half: float, whole: float) -> LayerPlan:
    errors = {
        "error_with_half_the_tokens": half,
        "error_with_refit": whole,
        "error_with_twice_the_tokens": whole - (half - whole) / 2,
    }
    return LayerPlan(0, torch.zeros(4, dtype=torch.int16), None, diagnostics=errors)


def test_a_short_text_is_said_with_what_more_would_bring() -> None:
    need = text_need([layer(0.12, 0.10), layer(0.14, 0.12)])
    assert need is not None
    assert (need.half, need.all, need.twice) == pytest.approx((0.13, 0.11, 0.10))
    with pytest.warns(MoeifyWarning, match=r"1,024 tokens leave 0\.1000 .* about 0\.0850 \(15% less\): --tokens 2048"):
        warn_of_few_tokens([layer(0.13, 0.10)], 1024)
    # Warnings are errors here.
    warn_of_few_tokens([layer(0.105, 0.10)], 1024)
    assert text_need([LayerPlan(0, torch.zeros(4, dtype=torch.int16), None)]) is None


def test_one_document_is_text_of_one_kind(dense: Path, calibration_file: Path, tmp_path: Path) -> None:
    with pytest.warns(MoeifyWarning, match="text is of one kind, documents in .*calibration.txt: 1;"):
        pipeline.split(str(dense), tmp_path / "one", options(calibration_file))
