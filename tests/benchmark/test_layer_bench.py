"""The layer benchmark: floors by hand, routing counted, errors seen, every peer accounted for, rows that survive."""

import dataclasses
import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moeify.benchmark.ceilings import Ceilings, measure_ceilings
from moeify.benchmark.layers import peers as peers_module
from moeify.benchmark.layers import table as layer_table
from moeify.benchmark.layers.accuracy import Error, Reference, outputs_and_gradients, saved_bytes
from moeify.benchmark.layers.cases import (
    SHAPES,
    Batch,
    Case,
    Layer,
    cases,
    draw_batch,
    draw_layer,
    parse_shape,
    seed_of,
    work,
)
from moeify.benchmark.layers.peers import DENSE, EAGER, OURS, PEERS, Forward, find_peers, peer
from moeify.benchmark.layers.results import LayerBench, Row, compared
from moeify.benchmark.options import LayerBenchOptions
from moeify.benchmark.timing import MAX_SAMPLES, MIN_SAMPLES, CpuTimer, take_turns, timer_for
from moeify.cli.app import run_command
from moeify.errors import InputError, UsageError
from moeify.results import read, to_json, write

bench_module = importlib.import_module("moeify.benchmark.layers.run")
layer_bench, main = bench_module.layer_bench, importlib.import_module("moeify.benchmark.layers.__main__").main

SMALL, PLAIN = "32x96-6/1+2", "32x96u-6/1+2"
CPU_PEERS = ("dense", "grouped_mm", "eager", "batched_mm")
CEILINGS = Ceilings(copy_bytes_per_second=4e12, matmul_flops_per_second=800e12, matmul_size=8192, dtype="bfloat16")


def quick(**changes: Any) -> LayerBenchOptions:
    return LayerBenchOptions(
        **{"cases": (SMALL,), "routings": ("uniform",), "device": "cpu", "seconds_per_row": 0.01, **changes}
    )


def load(file: Path) -> LayerBench:
    return read(file, LayerBench)


def one(shape: str = SMALL, tokens: int = 8, routing: str = "uniform", pass_name: str = "forward") -> Case:
    return Case(parse_shape(shape), tokens, routing, pass_name)


def draw(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Layer, Batch]:
    generator, host = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed_of(case))
    return draw_layer(case.shape, dtype, generator), draw_batch(case, dtype, generator, host)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> LayerBench:
    """Two cases on every peer that runs on a CPU."""
    out = tmp_path_factory.mktemp("bench") / "layer.json"
    options = quick(tokens=(8,), peers=CPU_PEERS)
    measured: LayerBench = layer_bench(cases(options), options, out=out, command="test")
    assert load(out) == measured
    return measured


def test_the_shapes_are_the_models() -> None:
    shape = parse_shape("llama3-8b-64/8+8")
    assert (shape.hidden, shape.width, shape.num_experts, shape.active) == (4096, 14336, 56, 8)
    assert (shape.expert_width, shape.shared_width) == (224, 1792)
    for name in SHAPES:
        assert parse_shape(name).expert_width % 8 == 0
    assert parse_shape("qwen2.5-0.5b-32/8") == dataclasses.replace(
        parse_shape("896x4864-32/8"), name="qwen2.5-0.5b-32/8"
    )


@pytest.mark.parametrize("name", ["llama", "64x256-8", "64x255-8/2", "64x256-8/7+2", "64x256-8/0", "gpt2-8/2"])
def test_a_shape_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        parse_shape(name)


def test_the_most_important_cases_come_first_and_none_is_lost() -> None:
    found = cases(LayerBenchOptions())
    assert len(found) == len(set(found)) == len(SHAPES) * 10 * 2 * 2
    head = found[: len(found) // 10]
    assert {"llama3-8b-8/2 T=1 uniform forward", "llama3-8b-64/16 T=8192 uniform training"} <= {
        case.name for case in head
    }
    assert all(case.routing == "uniform" for case in head[:6])
    assert found[-1].pass_name == "training"
    assert found[-1].tokens < 512


def test_unknown_routings_and_passes_are_named() -> None:
    for options in ({"routings": ("even",)}, {"passes": ("back",)}, {"tokens": (0,)}):
        with pytest.raises(UsageError):
            quick(**options)


def test_a_plain_ffn_has_two_matrices_and_biases() -> None:
    shape = parse_shape("gpt2-xl-8/2")
    assert (shape.hidden, shape.width, shape.plain) == (1600, 6400, True)
    plain, gated = (work(one(name, 1), 2, CEILINGS, element_bytes=2).flops for name in (PLAIN, SMALL))
    assert plain * 3 == gated * 2
    layer, _ = draw(one(PLAIN))
    assert layer.up_EPD.shape == (5, 16, 32)
    assert all(bias is not None and bias.any() for bias in (layer.bias_EP, layer.dense_bias_P, layer.shared_bias_P))
    with pytest.raises(ValueError, match="have a gate and no biases"):
        PEERS["liger"].build(layer)


def test_floor_by_hand() -> None:
    """D 4096, F 1792, bf16: two experts are 2 * 3 * 4096 * 1792 weights of 2 bytes, one token is 8 kB in and out."""
    forward = work(one("llama3-8b-8/2", 1), 2, CEILINGS, element_bytes=2)
    assert forward.num_bytes == 88_080_384 + 16_384
    assert forward.flops == 88_080_384
    assert forward.seconds == pytest.approx((88_080_384 + 16_384) / 4e12)
    many = work(one("llama3-8b-8/2", 8192), 8, CEILINGS, element_bytes=2)
    assert many.seconds == pytest.approx(8192 * 88_080_384 / 800e12)
    dense = work(one("llama3-8b-8/2", 1), 2, CEILINGS, element_bytes=2, dense=True)
    assert dense.num_bytes == 4 * 88_080_384 + 16_384


def test_floor_of_training_by_hand() -> None:
    """Backward reads again what forward read, and writes a gradient of every weight, hit or not."""
    case = one("llama3-8b-16/4+4", 1, pass_name="training")
    expert, token = 3 * 4096 * 896 * 2, 4096 * 2
    found = work(case, 4, CEILINGS, element_bytes=2)
    forward = (4 + 4) * expert + 2 * token
    backward = (4 + 4) * expert + 16 * expert + 3 * token
    assert found.num_bytes == forward + backward
    assert found.flops == 3 * 2 * 8 * expert / 2
    assert found.seconds == pytest.approx((forward + backward) / 4e12)


def test_both_passes_have_their_own_floor() -> None:
    """On many tokens arithmetic decides: forward once, backward twice."""
    found = work(one("llama3-8b-8/2", 8192, pass_name="training"), 8, CEILINGS, element_bytes=2)
    assert found.seconds == pytest.approx(3 * 8192 * 88_080_384 / 800e12)


def test_routing_is_counted_not_assumed() -> None:
    _, batch = draw(one("64x256-8/2", 512))
    counts = Counter(batch.experts_TK.flatten().tolist())
    assert batch.num_experts_hit == len(counts) == 8
    assert all(len(set(chosen)) == 2 for chosen in batch.experts_TK.tolist())
    assert max(counts.values()) < 2 * min(counts.values())
    torch.testing.assert_close(batch.weights_TK.sum(dim=-1), torch.ones(512))
    crowded = dataclasses.replace(batch, experts_TK=torch.zeros(4, 1, dtype=torch.int64))
    assert crowded.num_experts_hit == 1


def test_zipf_routing_is_skewed_and_every_token_still_has_different_experts() -> None:
    _, batch = draw(one("64x256-16/2", 2048, "zipf"))
    counts = sorted(Counter(batch.experts_TK.flatten().tolist()).values(), reverse=True)
    assert counts[0] > 4 * counts[-1]
    assert all(len(set(chosen)) == 2 for chosen in batch.experts_TK.tolist())


def test_the_same_case_has_the_same_routing_everywhere() -> None:
    first, again, other = (draw(case)[1].experts_TK for case in (one(), one(), one(tokens=9)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other[:8])


@pytest.mark.parametrize("name", [*CPU_PEERS, OURS])
@pytest.mark.parametrize("shape", [SMALL, "32x96-6/3", PLAIN])
def test_peers_compute_what_the_definition_says(name: str, shape: str) -> None:
    layer, batch = draw(one(shape))
    error = Reference(layer, batch, dense=name == DENSE, training=True).error(
        outputs_and_gradients(PEERS[name], layer, batch, training=True)
    )
    assert error.output < 1e-6
    assert error.gradients is not None
    assert error.gradients < 1e-5


@pytest.mark.parametrize("which", range(5))
def test_a_wrong_output_or_gradient_is_seen(which: int) -> None:
    """Output, gradients of inputs, routing weights, up and down: one token or expert off at a time."""
    layer, batch = draw(one("32x96-6/3"))
    reference = Reference(layer, batch, dense=False, training=True)
    found = outputs_and_gradients(PEERS[EAGER], layer, batch, training=True)
    exact = reference.error(found)
    assert not exact.is_wrong(exact)
    found[which] = found[which] * 1.1
    assert reference.error(found).is_wrong(exact)
    found[which] = torch.full_like(found[which], float("nan"))
    assert reference.error(found).is_wrong(exact)


def test_rounding_is_not_wrong() -> None:
    assert not Error(6e-3, 7e-3).is_wrong(Error(5e-3, 6e-3))
    assert not Error(1.5e-2).is_wrong(None)
    assert Error(5e-2).is_wrong(Error(5e-3))
    assert Error(5e-3, 0.5).is_wrong(Error(5e-3, 5e-3))


def test_saved_bytes_are_counted_once_and_without_weights() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    inputs = torch.randn(3, 4, requires_grad=True)
    # linear keeps its inputs (and the weight), exp its result; the second exp keeps the view of the same storage.
    assert saved_bytes(lambda: torch.nn.functional.linear(inputs, weight).exp(), [weight]) == 2 * 3 * 4 * 4
    assert saved_bytes(lambda: torch.nn.functional.linear(inputs, weight), [weight]) == 3 * 4 * 4


def test_rows_are_consistent(result: LayerBench) -> None:
    assert len(result.rows) == 2 * len(CPU_PEERS)
    assert result.not_run == []
    for row in result.rows:
        assert row.status == "ok", row.reason
        assert row.us is not None
        assert row.floor_us is not None
        assert row.flops is not None
        assert row.us_low is not None
        assert row.us_high is not None
        assert row.us_low <= row.us <= row.us_high
        assert MIN_SAMPLES <= row.num_samples <= MAX_SAMPLES
        assert row.time_over_floor == pytest.approx(row.us / row.floor_us)
        assert row.tflops_per_second == pytest.approx(row.flops / row.us / 1e6)
        assert row.floor_bytes is not None
        assert row.gb_per_second == pytest.approx(row.floor_bytes / row.us / 1e3)
        assert row.method == "loop"
        assert row.error is not None
        assert row.error < 1e-6
        assert (row.saved_bytes_per_token is None) == (row.pass_name == "forward")
        assert (row.experts_hit is None) == (row.peer == DENSE)
    (dense,) = (row for row in result.rows if row.peer == DENSE and row.pass_name == "forward")
    assert dense.time_over_dense == 1
    assert dense.flops == 8 * 6 * 32 * 96


def test_what_peers_keep_for_backward_is_measured(result: LayerBench) -> None:
    """grouped_mm keeps at least the gathered tokens and both projections of every chosen expert."""
    saved = {row.peer: row.saved_bytes_per_token for row in result.rows if row.pass_name == "training"}
    assert saved["grouped_mm"] is not None
    assert saved["grouped_mm"] >= 4 * (2 * 32 + 2 * 2 * 16)
    # batched_mm copies the weights of every token's experts.
    assert saved["batched_mm"] is not None
    assert saved["batched_mm"] >= 4 * 2 * 3 * 32 * 16


def test_json_has_its_schema_and_says_where_it_was_measured(result: LayerBench, tmp_path: Path) -> None:
    write(result, tmp_path / "again.json")
    stored = json.loads((tmp_path / "again.json").read_text())
    assert stored == json.loads(json.dumps(to_json(result)))
    assert {"machine", "versions", "date", "command", "dtype", "ceilings", "rows", "not_run", "stopped"} <= set(stored)
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["ceilings"]["copy_bytes_per_second"] > 1e8
    assert set(stored["rows"][0]) == {field.name for field in dataclasses.fields(Row)}
    with pytest.raises(InputError):
        load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"schema": "moeify.split/1"}')
    with pytest.raises(InputError, match=r"moeify\.split/1"):
        load(tmp_path / "other.json")


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    def killed(items: Iterable[Case], label: str, total: int) -> Iterator[Case]:
        for number, item in enumerate(items):
            if number == 1:
                raise KeyboardInterrupt
            yield item

    out, options = tmp_path / "layer.json", quick(tokens=(1, 2), peers=("dense",))
    with pytest.raises(KeyboardInterrupt):
        layer_bench(cases(options), options, out=out, track=killed)
    assert [(row.tokens, row.peer, row.status) for row in load(out).rows] == [(1, "dense", "ok")]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_stops_at_its_limit_and_says_what_is_missing(tmp_path: Path) -> None:
    options = quick(tokens=(1, 2), peers=("dense",), limit_seconds=0)
    stopped = layer_bench(cases(options), options, out=tmp_path / "layer.json")
    assert stopped.rows == []
    assert stopped.not_run == [case.name for case in cases(options)]
    assert "limit of 0 s" in stopped.stopped
    assert load(tmp_path / "layer.json") == stopped


def test_an_existing_result_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    out.write_text("mine")
    # Nobody else's file is replaced even then.
    for overwrite in (False, True):
        with pytest.raises(InputError):
            layer_bench([], quick(), out=out, overwrite=overwrite)
    assert out.read_text() == "mine"
    out.unlink()
    layer_bench([], quick(), out=out)
    with pytest.raises(InputError, match="exists"):
        layer_bench([], quick(), out=out)
    layer_bench([], quick(), out=out, overwrite=True)
    assert load(out).rows == []


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three more peers: one that raises, one that is wrong, one that raises after it has been prepared."""
    monkeypatch.setattr("moeify.benchmark.layers.peers.PEERS", PEERS.copy())
    monkeypatch.setattr(bench_module, "PEERS", PEERS)
    calls = Counter[str]()

    @peer("raises")
    def raises(layer: Layer) -> Forward:
        raise ImportError("no module of that name\nsecond line")

    @peer("twice")
    def twice(layer: Layer) -> Forward:
        exact = PEERS[EAGER].build(layer)
        return lambda batch: 2 * exact(batch)

    @peer("later")
    def later(layer: Layer) -> Forward:
        exact = PEERS[EAGER].build(layer)

        def forward(batch: Batch) -> Tensor:
            calls["later"] += 1
            if calls["later"] > 6:
                raise MemoryError("out of memory")
            return exact(batch)

        return forward


@pytest.mark.usefixtures("broken")
def test_a_peer_that_cannot_run_or_is_wrong_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["dense", "raises", "twice", "later"]
    measured = layer_bench([one()], quick(peers=tuple(names), seconds_per_row=0.2))
    rows = {row.peer: row for row in measured.rows}
    assert list(rows) == [name for name in peers_module.PEERS if name in names]
    assert rows["raises"].status == "failed"
    assert rows["raises"].reason == "ImportError: no module of that name"
    assert rows["raises"].us is None
    assert rows["raises"].floor_us is not None
    assert rows["twice"].status == "wrong"
    assert rows["twice"].us is not None
    assert rows["later"].status == "failed"
    assert "MemoryError" in rows["later"].reason
    assert rows["dense"].status == "ok"
    shown = layer_table.text(measured)
    assert "raises, 1 case: failed: ImportError: no module of that name" in shown
    assert "twice, 1 case: wrong" in shown


def test_an_unknown_peer_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="'vllm' is not a peer") as caught:
        find_peers(["dense", "vllm"])
    assert "grouped_mm" in caught.value.hint
    assert [found.name for found in find_peers(["eager", "dense"])] == ["dense", "eager"]
    assert [found.name for found in find_peers([])] == list(PEERS)


@pytest.mark.parametrize(
    "options", [{"device": "tpu9"}, {"device": "cuda:77"}, {"dtype": "int8"}, {"peers": ("vllm",)}], ids=str
)
def test_what_is_not_there_is_a_usage_error(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        layer_bench([one()], quick(**options))


def row(name: str, us: float | None, launch_us: float | None = None, **more: Any) -> Row:
    shape = one().shape
    return Row(
        case="case",
        shape=shape.name,
        tokens=8,
        routing="uniform",
        pass_name="forward",
        hidden=32,
        width=96,
        slices=6,
        shared=1,
        active=2,
        peer=name,
        us=us,
        launch_us=launch_us,
        **more,
    )


def test_ours_is_marked_where_another_is_ahead() -> None:
    rows = [row("moeify", 10, 30), row("dense", 20, 20), row("eager", 5, 40), row("liger", 1, 1, status="wrong")]
    ours, dense, *_ = compared(rows, ours="moeify", dense="dense")
    assert ours.beaten_by == ("eager",)
    assert ours.launch_beaten_by == ("dense",)
    assert ours.time_over_dense == 0.5
    assert dense.beaten_by is None
    failed, *_ = compared([row("moeify", None, status="failed"), *rows[1:]], ours="moeify", dense="dense")
    assert failed.beaten_by == ("dense", "eager")
    (alone, *_) = compared([row("moeify", 10, 30)], ours="moeify", dense="dense")
    assert alone.beaten_by == ()
    assert alone.time_over_dense is None


def test_tables_mark_and_show_reasons(result: LayerBench) -> None:
    rows = compared(
        [row("moeify", 10, 30, method="graph", error=1e-3, eager_error=2e-3), row("dense", 5, 20, method="graph")],
        ours="moeify",
        dense="dense",
    )
    waits = row("eager", 50, 60, method="stream", method_reason="it waits")
    shown = dataclasses.replace(result, rows=[*rows, waits], not_run=["x"], stopped="the limit of 1 s was reached")
    text = layer_table.text(shown)
    assert "50.0 s" in text
    assert "eager, 1 case: no graph (s): it waits" in text
    assert "moeify is ahead of every peer on 0 of 1 case" in text
    assert "1 case not run: the limit of 1 s was reached" in text
    times, details = layer_table.grids(shown)
    assert times.columns[4:7] == ("moeify", "dense", "eager")
    assert times.lines[0][-1] == layer_table.MARK
    assert details.lines[0][-2:] == ("1.0e-03", "2.0e-03")
    table = layer_table.markdown(shown)
    assert table.count("| --- |") == 2
    assert "| \\* |" in table
    for line in table.splitlines():
        assert line.count("|") in (0, len(times.columns) + 1, len(details.columns) + 1)


def test_slow_candidates_give_fewer_samples_and_none_is_left_out() -> None:
    order: list[str] = []
    clock = CpuTimer()

    def measure(name: str, loops: int) -> float:
        order.append(name)
        return clock.first(lambda: sum(range(loops)))

    found = take_turns({"slow": lambda: measure("slow", 400_000), "fast": lambda: measure("fast", 10)}, seconds=0.02)
    assert MIN_SAMPLES <= len(found["slow"].seconds) < len(found["fast"].seconds) <= MAX_SAMPLES
    assert found["fast"].median < found["slow"].median
    assert order[:4] == ["slow", "fast", "fast", "slow"]


def test_an_error_takes_one_candidate_out() -> None:
    def fails() -> float:
        raise RuntimeError("gone")

    found = take_turns({"fails": fails, "works": lambda: 1.0}, seconds=0.01)
    assert str(found["fails"].failure) == "gone"
    assert found["works"].median == 1.0


def test_ceilings_are_measured() -> None:
    found = measure_ceilings(CpuTimer(), torch.float32)
    assert 1e8 < found.copy_bytes_per_second < 1e13
    assert 1e8 < found.matmul_flops_per_second < 1e15


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--cases", SMALL, "--tokens", "2", "--routings", "zipf", "--peers", "dense,eager", "--seconds-per-row"]
    options = [*small, "0.01", "--device", "cpu", "--out", str(tmp_path / "layer.json")]
    assert run_command(["bench-layer", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "moeify.layer-bench/1"
    assert len(found["rows"]) == 4
    assert run_command(["bench-layer", *options]) == 3
    assert run_command(["bench-layer", *options, "--overwrite"]) == 0
    assert "training, zipf routing" in capsys.readouterr().out
    assert run_command(["bench-layer", "--tokens", "many"]) == 2
    assert run_command(["bench-layer", "--cases", "nothing"]) == 2


def test_module_runs_with_few_dependencies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "layer.json"
    options = ["--cases", SMALL, "--tokens", "2", "--peers", "dense,grouped_mm", "--seconds-per-row", "0.01"]
    code = (
        "import sys\n"
        "for name in ('rich', 'typer', 'pydantic', 'datasets', 'sklearn', 'ot'): sys.modules[name] = None\n"
        "from moeify.benchmark.layers.__main__ import main\n"
        f"sys.exit(main({[*options, '--device', 'cpu', '--out', str(out)]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "forward, uniform routing, us" in done.stdout
    assert "4/4" in done.stderr
    assert load(out).command.startswith("python -m moeify.benchmark.layers --cases ")
    assert main(["--peers", "vllm"]) == 2
    assert "hint: there are" in capsys.readouterr().err


def test_ours_takes_part_on_a_cpu() -> None:
    options = quick(cases=("32x64-4/2",), tokens=(2,), peers=("moeify", "dense"))
    measured = layer_bench(cases(options), options)
    forward, training = (row for row in measured.rows if row.peer == "moeify")
    assert (forward.status, training.status) == ("ok", "ok"), (forward.reason, training.reason)
    for row in (forward, training):
        assert row.error is not None
        assert row.error < 1e-5
        assert row.beaten_by is not None
    assert training.gradient_error is not None
    assert training.gradient_error < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_graphs_hold_what_can_be_captured() -> None:
    peers = ("moeify", "dense", "eager", "batched_mm")
    options = quick(cases=("512x2048-8/2",), tokens=(4, 512), peers=peers, device="cuda", seconds_per_row=0.1)
    measured = layer_bench(cases(options), options)
    methods = {(row.peer, row.pass_name): (row.method, row.method_reason) for row in measured.rows}
    assert all(row.status == "ok" for row in measured.rows), [row.reason for row in measured.rows]
    assert methods["dense", "forward"] == ("graph", "")
    assert methods["dense", "training"] == ("graph", "")
    assert methods["moeify", "forward"] == ("graph", "")
    assert methods["moeify", "training"] == ("graph", "")
    # Its loop asks the device which experts were hit.
    assert methods["eager", "forward"][0] == "stream"
    assert "synchron" in methods["eager", "forward"][1]
    for row in measured.rows:
        assert row.us is not None
        assert row.launch_us is not None
        assert row.time_over_floor is not None
        assert row.time_over_floor > 0.9
        assert row.peak_memory_bytes is not None
        assert row.peak_memory_bytes >= row.tokens * 512 * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_time_grows_with_the_work() -> None:
    timer = timer_for(torch.device("cuda", 0))
    sizes = {size: torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for size in (1024, 4096)}
    seconds = {
        size: timer.sample(timer.candidate([lambda matrix=matrix: matrix @ matrix] * 8))  # type: ignore[misc]
        for size, matrix in sizes.items()
    }
    assert seconds[4096] > 8 * seconds[1024]
