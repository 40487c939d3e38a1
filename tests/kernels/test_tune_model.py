"""Tuning with a clock of our own, and the file that keeps what was found."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from conftest import MakeDense

from moeify.cli.app import run_command
from moeify.errors import InputError
from moeify.kernels import launch, tune
from moeify.kernels.launch import TABLE, Launch, keep_tuned, launch_for, launching, tuned_file
from moeify.kernels.tune import Shape, keys_of
from moeify.kernels.tune_model import experts_shape, tune_model

CPU = torch.device("cpu")
# Narrow experts.
SHAPE = Shape(dim=32, width=16, num_experts=4, num_ranks=2, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _untuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    launch.tuned.cache_clear()
    yield
    launch.tuned.cache_clear()


def current(key: str) -> Launch:
    return launch_for(key, torch.bfloat16, CPU)


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=128, max_position_embeddings=64)


def test_the_winner_of_each_kernel_is_found_and_used_for_the_next() -> None:
    wanted = {
        "up/128/narrow": replace(TABLE["up/128/narrow"], cols=64),
        "down/128/narrow": replace(TABLE["down/128/narrow"], inner=64),
    }
    seen = []

    def time(call: Callable[[], Any]) -> float:
        now = {key: current(key) for key in wanted}
        seen.append(now)
        return 100.0 - 10 * sum(now[key] == wanted[key] for key in wanted)

    found = list(tune.tune(SHAPE, [1000], device=CPU, backward=False, time=time))
    assert {one.key: one.launch for one in found} == wanted
    assert [(one.before_us, one.after_us) for one in found] == [(100.0, 90.0), (90.0, 80.0)]
    assert all(now["up/128/narrow"] == wanted["up/128/narrow"] for now in seen[-5:])


def test_noise_changes_nothing() -> None:
    times = iter(range(10**6))
    found = list(tune.tune(SHAPE, [1, 2], device=CPU, time=lambda _: 1000.0 - next(times) % 7))
    assert [one.launch for one in found] == [TABLE[one.key] for one in found]


def test_what_the_device_cannot_run_is_counted_and_passed_over() -> None:
    def time(call: Callable[[], Any]) -> float:
        if current("decode_up/16/narrow").stages < 4:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return 5.0

    first = next(tune.tune(SHAPE, [2], device=CPU, time=time))
    assert first.failed == 18
    assert first.tried > first.failed


def test_processes_that_fail_to_compile_ahead_are_counted() -> None:
    impossible = replace(SHAPE, num_ranks=SHAPE.num_experts + 1)
    assert tune.compile_ahead(impossible, [1], device=CPU, backward=False, processes=1) == 1


@pytest.mark.parametrize("share", [0, 1])
def test_shares_cover_all_that_will_be_tried(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Launch] = []
    monkeypatch.setattr(tune, "moe_ffn", lambda *_, **__: seen.append(current("single_down/1/narrow")))
    tune._compile_share(SHAPE, [1], CPU, False, 2, share)
    tried = [one for key in keys_of(SHAPE, 1, backward=False) for one in tune.candidates(key, current(key))]
    assert len(seen) == (len(tried) + share) // 2


@pytest.mark.parametrize(("tokens", "calls"), [(2, 1), (70, 2)])
def test_the_calls_that_are_timed_compute_there_and_back(tokens: int, calls: int) -> None:
    outputs: dict[int, Any] = {}

    def time(call: Callable[[], Any]) -> float:
        # Once for each call: candidates of the same call differ in their launches only.
        if id(call) not in outputs:
            outputs[id(call)] = call()
        return 1.0

    list(tune.tune(SHAPE, [tokens], device=CPU, time=time))
    assert len(outputs) == calls
    forward, *backward = outputs.values()
    assert forward.shape == (tokens, 32)
    for grads in backward:
        assert [grad.shape for grad in grads] == [(tokens, 32), (4, 32, 32), (4, 32, 16), (tokens, 2)]
        assert all(grad.any() for grad in grads)


@pytest.mark.parametrize("tokens", [1, 64, 65, 200, 8192])
def test_every_launch_of_a_call_is_in_the_table(tokens: int) -> None:
    for shape in (SHAPE, Shape(64, 64, 64, 16), Shape(64, 64, 1, 1)):
        assert set(keys_of(shape, tokens, backward=False)) <= set(TABLE)
        assert set(keys_of(shape, tokens, backward=True)) <= set(TABLE)


def test_the_height_of_a_tile_is_its_key_and_sizes_are_powers_of_two() -> None:
    for key, found in TABLE.items():
        for candidate in (found, *tune.candidates(key, found)):
            # Those two sort nothing.
            assert candidate.rows == int(key.split("/")[1]) or key.startswith(("single_down", "weight_grad"))
            sizes = (candidate.rows, candidate.cols, candidate.inner, candidate.warps, candidate.group)
            assert all(size & (size - 1) == 0 for size in sizes), candidate


def test_what_was_kept_is_used_by_the_next_process_and_added_to() -> None:
    one, two = Launch(128, 64, 64, 8, 2), Launch(128, 128, 32, 4, 2, tma=True)
    keep_tuned(CPU, {"up/128": one})
    path = keep_tuned(CPU, {"down/128": two})
    assert path == tuned_file(CPU)
    assert (current("up/128"), current("down/128"), current("up/64")) == (one, two, TABLE["up/64"])
    assert json.loads(path.read_text())["schema"] == "moeify.launch/1"
    with launching({"up/128": two}):
        assert current("up/128") == two
    assert current("up/128") == one


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"launches": {"up/128": {"rows": 1}}}', '{"launches": [1]}'])
def test_a_file_that_is_no_table_is_named(text: str) -> None:
    path = tuned_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError, match="holds no launches of moeify tune"):
        current("up/128")


def test_four_byte_elements_take_smaller_tiles() -> None:
    narrow = launch_for("down/128", torch.float32, CPU)
    wide = TABLE["down/128"]
    assert narrow.inner * narrow.cols * 4 < wide.inner * wide.cols * 2


def test_the_shape_of_a_converted_model(dense: Path, calibration_file: Path, tmp_path: Path) -> None:
    text = ["--calibration", str(calibration_file), "--tokens", "1024"]
    out = tmp_path / "moe"
    assert run_command(["split", str(dense), *text, "-o", str(out), "--experts", "8", "--quiet"]) == 0
    config = json.loads((out / "config.json").read_text())
    shape = experts_shape(str(out))
    assert shape.dim == config["hidden_size"]
    assert (shape.num_experts, shape.num_ranks) == (config["num_local_experts"], config["num_experts_per_tok"])
    assert shape.width == config["intermediate_size"]
    assert (shape.activation, shape.gated) == ("silu", True)


def test_a_dense_model_has_nothing_to_tune(dense: Path) -> None:
    with pytest.raises(InputError, match="has no experts"):
        experts_shape(str(dense))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_tuned(dense: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="there is no CUDA device here"):
        tune_model(str(dense))
    assert run_command(["tune", str(dense)]) == 3
    assert "there is no CUDA device here" in capfd.readouterr().err
