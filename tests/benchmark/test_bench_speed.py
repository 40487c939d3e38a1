"""Speed and memory of tiny real models: who runs, what is noted of a pass, how ratios and verdicts come about."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDense
from tiny_moe import ARCHITECTURES, chosen_of, text, tiny

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.models import contenders as contenders_module
from moeify.benchmark.models import speed as speed_module
from moeify.benchmark.models.anatomy import anatomy
from moeify.benchmark.models.contenders import Contender, contenders
from moeify.benchmark.models.inputs import prompts
from moeify.benchmark.models.memory import measure_memory
from moeify.benchmark.models.results import Model, Part, Speed
from moeify.benchmark.models.routing import ExpertsHit, watching
from moeify.benchmark.models.speed import measure_speed, over, unchanged
from moeify.benchmark.models.verdicts import fastest, verdicts
from moeify.benchmark.options import BenchOptions
from moeify.benchmark.timing import MIN_SAMPLES, CpuTimer, Samples
from moeify.errors import UsageError

CEILINGS = Ceilings(copy_bytes_per_second=1e9, matmul_flops_per_second=1e12, matmul_size=1, dtype="float32")
STOCK = ("eager", "batched_mm", "grouped_mm")
REGIMES = ((1, 4), (3, 8))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    found = {"dense": tiny("Llama"), "moe": tiny("GraniteMoeShared"), "static": tiny("Llama", intermediate_size=16)}
    return {name: model.eval().cpu() for name, model in found.items()}


def taking_part(models: dict[str, Any], asked: tuple[str, ...] = STOCK) -> list[Contender]:
    return contenders(models, {name: anatomy(model.config) for name, model in models.items()}, asked)


def measured(found: list[Contender], **changes: Any) -> list[Speed]:
    arguments: dict[str, Any] = {"dense": "dense", "seconds": 0.001, "ceilings": CEILINGS, **changes}
    cases = {regime: {"input_ids": prompts(text(1, 200)[0].cpu(), *regime)} for regime in REGIMES}
    return measure_speed(found, cases, CpuTimer(), **arguments)


@pytest.fixture(scope="module")
def rows(models: dict[str, Any]) -> list[Speed]:
    return measured(taking_part(models))


def test_every_model_and_implementation_has_a_row_a_phase_and_regime(rows: list[Speed]) -> None:
    who = [("dense", "dense"), *(("moe", name) for name in STOCK), ("static", "dense")]
    expected = {(*pair, phase, *regime) for pair in who for phase in ("prefill", "decode") for regime in REGIMES}
    found = [(row.model, row.implementation, row.phase, row.batch, row.prompt_tokens) for row in rows]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert not any(row.reason for row in rows)


def test_rows_are_consistent(rows: list[Speed]) -> None:
    for row in rows:
        assert row.ms_p10 is not None
        assert row.ms_p50 is not None
        assert row.ms_p90 is not None
        assert row.bytes_read is not None
        assert row.flops is not None
        assert row.floor_ms is not None
        assert row.num_samples >= MIN_SAMPLES
        assert 0 < row.ms_p10 <= row.ms_p50 <= row.ms_p90
        tokens = row.batch * (row.prompt_tokens if row.phase == "prefill" else 1)
        assert row.tokens_per_second == pytest.approx(1e3 * tokens / row.ms_p50)
        assert row.floor_ms == pytest.approx(1e3 * max(row.bytes_read / 1e9, row.flops / 1e12))
        assert row.time_over_floor == pytest.approx(row.ms_p50 / row.floor_ms)
        assert (row.time_over_dense is None) == (row.model == "dense")
        assert (row.experts_hit is None) == (row.model != "moe")
        if row.time_over_dense is not None:
            assert row.time_over_dense_low is not None
            assert row.time_over_dense_high is not None
            assert row.time_over_dense_low <= row.time_over_dense <= row.time_over_dense_high
        if row.model == "moe" and row.phase == "decode" and row.batch == 1:
            assert row.experts_hit == 2 / 4


def test_without_ceilings_there_are_no_floors(models: dict[str, Any]) -> None:
    assert {row.floor_ms for row in measured(taking_part(models, ("eager",)), ceilings=None)} == {None}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_experts_hit_are_those_that_routers_chose(name: str) -> None:
    model = tiny(name).eval().cpu()
    chosen: list[torch.Tensor] = []
    for module in list(model.modules()):
        if "Router" in type(module).__name__:
            module.register_forward_hook(lambda _, __, out: chosen.append(chosen_of(out)))
    hit = ExpertsHit()
    with watching(model, hit.see):
        model(text(1, 3).cpu())
    num_experts = anatomy(model.config).experts.num_routed  # type: ignore[union-attr]
    assert hit.share == sum(len(set(one.flatten().tolist())) for one in chosen) / len(chosen) / num_experts
    model(text(1, 30).cpu())
    assert len(chosen) == 2 * len(hit._shares)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "Llama", "Mistral"])
@torch.no_grad()
def test_every_decoded_sample_sees_the_same_cache(name: str) -> None:
    options = {"sliding_window": 4} if name == "Mistral" else {}
    model = tiny(name, **options).eval().cpu()
    ids = text(2, 9).cpu()
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    found = []
    for _ in range(3):
        with unchanged(cache):
            found.append(model(ids[:, -1:], past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == 8
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.allclose(found[0][:, -1], model(ids).logits[:, -1], atol=1e-4)
    # Without it the second one would have been longer.
    model(ids[:, -1:], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 9


def test_prompts_are_consecutive_text_with_the_next_token() -> None:
    assert prompts(torch.arange(20), 3, 4).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def test_ratios_are_of_passes_of_one_round() -> None:
    """A machine that becomes ten times slower half-way changes times, not ratios."""
    dense = Samples([1.0, 1.0, 10.0, 10.0, 10.0, 10.0])
    assert over(Samples([2.0, 2.0, 20.0, 20.0]), dense) == (2, 2, 2)
    ratio, low, high = over(Samples([1.0, 3.0, 20.0, 20.0, 20.0]), dense)
    assert ratio == 2
    assert 1 <= low < ratio < high <= 3


def test_one_that_fails_says_why_and_the_others_go_on(models: dict[str, Any]) -> None:
    broken = tiny("Llama").eval().cpu()
    broken.model.layers[0].register_forward_pre_hook(_fail)
    found = [*taking_part(models, ("eager",)), Contender("broken", "dense", broken, anatomy(broken.config))]
    rows = measured(found)
    reasons = {(row.model, row.phase): row.reason for row in rows}
    assert reasons["broken", "prefill"] == "RuntimeError: out of luck"
    assert reasons["broken", "decode"] == "its prefill did not run"
    assert all(row.ms_p50 is not None for row in rows if row.model != "broken")


def _fail(*_: Any) -> None:
    raise RuntimeError("out of luck")


def test_copies_that_do_not_fit_are_not_made(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders_module, "free_bytes", lambda _: 2 * 4 * 2 * 3 * 32 * 32 * 4 - 1)
    rows = [row for row in measured(taking_part(models)) if row.implementation == "batched_mm"]
    refused = {(row.phase, row.batch): "GB of weights" in row.reason for row in rows}
    # Four tokens of two experts of 3 x 32 x 32 float32 are half of that and one.
    assert refused == {("prefill", 1): True, ("prefill", 3): True, ("decode", 1): False, ("decode", 3): False}


@pytest.mark.parametrize(
    ("seconds", "left_out"),
    [
        # Dense, eager, grouped_mm, static.
        ((60.0, 50.0, 20.0, 40.0), [1]),
        ((60.0, 20.0, 50.0, 40.0), [2]),
        ((60.0, 35.0, 20.0, 40.0), []),
        ((60.0, 9.0, 2.0, 40.0), []),
    ],
)
def test_a_slow_implementation_is_left_out_and_the_fastest_never(
    seconds: tuple[float, ...], left_out: list[int], models: dict[str, Any]
) -> None:
    found = taking_part(models, ("eager", "grouped_mm"))
    passes = [speed_module._Pass(list, seconds=one) for one in seconds]
    assert speed_module._leave_out_slow(found, passes, 10.0) == [found[number] for number in left_out]
    assert [bool(one.reason) for one in passes] == [number in left_out for number in range(4)]


def test_what_was_slow_at_few_tokens_is_not_tried_at_more(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_module, "_leave_out_slow", lambda found, *_: found[1:2])
    rows = measured(taking_part(models, ("eager", "grouped_mm")))
    reasons = {(row.phase, row.batch): row.reason for row in rows if row.implementation == "eager"}
    assert [bool(reasons[phase, batch]) for phase in ("prefill", "decode") for batch in (1, 3)] == [0, 1, 0, 1]
    assert all("at fewer tokens" in reason for reason in reasons.values() if reason)
    assert not any(row.reason for row in rows if row.implementation != "eager")


def test_our_kernels_are_listed_only_where_they_run(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders_module, "unsupported", lambda *_: "not here")
    assert "moeify" not in {who.implementation for who in taking_part(models, ())}
    reasons = {row.implementation: row.reason for row in measured(taking_part(models, ("moeify", "eager")))}
    assert reasons == {"dense": "", "moeify": "not here", "eager": ""}
    monkeypatch.setattr(contenders_module, "unsupported", lambda *_: None)
    assert "moeify" in {who.implementation for who in taking_part(models, ())}
    with pytest.raises(UsageError, match="'fastest' is not a value of --implementation"):
        BenchOptions(implementation=("fastest",))  # type: ignore[arg-type]


def test_memory_is_that_of_the_models_own_process(make_dense: MakeDense, tmp_path: Path) -> None:
    """Not of the one that started it, which holds a gigabyte here."""
    held = torch.ones(1 << 30, dtype=torch.uint8)
    found = measure_memory(make_dense("llama"), {"input_ids": text(2, 8)}, writes=True, dtype="float32", device="cpu")
    assert found.reason == ""
    assert found.load_peak_bytes is not None
    assert found.peak_bytes is not None
    assert 50e6 < found.load_peak_bytes <= found.peak_bytes < held.nbytes


def test_memory_that_cannot_be_measured_says_why(tmp_path: Path) -> None:
    found = measure_memory(tmp_path / "nothing", {"input_ids": text(1, 2)}, writes=True, dtype="float32", device="cpu")
    assert (found.load_peak_bytes, found.peak_bytes) == (None, None)
    assert "nothing" in found.reason


def model(name: str, kind: Any, num_experts: int | None = None, active_share: float = 1.0) -> Model:
    parts = {"attention": Part(40, 40, 80, 160), "ffn": Part(60, 60, 120, 240)}
    return Model(name, name, kind, "llama", 1, num_experts, None, None, active_share, parts, 400)


DENSE, MOE, STATIC = model("dense", "dense"), model("moe", "moe", 8, 0.5), model("static", "static", None, 0.5)


def row(name: str, ratio: float | None, *, spread: float = 0.02, hit: float | None = None, **changes: Any) -> Speed:
    values: dict[str, Any] = {"ms_p50": 10.0 * (ratio or 1), "bytes_read": 1000, "flops": 1000, "experts_hit": hit}
    if ratio is not None:
        interval = {"time_over_dense_low": ratio - spread, "time_over_dense_high": ratio + spread}
        values |= {"time_over_dense": ratio, **interval}
    return dataclasses.replace(Speed(name, "eager", "decode", 8, 64), **{**values, **changes})


def test_the_fastest_implementation_has_the_least_ratio_to_dense_or_time_without_ratios() -> None:
    # Drift made the better one look slower.
    drifted = row("moe", 1.2, implementation="grouped_mm", ms_p50=30.0)
    rows = [row("moe", 1.3, ms_p50=10.0), drifted, Speed("moe", "moeify", "decode", 8, 64, reason="no GPU")]
    assert fastest(rows, "moe") == drifted
    assert fastest([row("dense", None), row("dense", None, ms_p50=9.0)], "dense") == row("dense", None, ms_p50=9.0)
    assert fastest(rows, "dense") is None


def test_a_verdict_is_about_the_fastest_implementation() -> None:
    slow = row("moe", 2.0, hit=0.5, implementation="batched_mm")
    (found,) = verdicts([DENSE, MOE], [row("dense", None), slow, row("moe", 1.2, hit=0.5)])
    assert (found.model, found.implementation, found.outcome, found.time_over_dense) == ("moe", "eager", "slower", 1.2)


@pytest.mark.parametrize(
    ("ratio", "spread", "outcome"),
    [
        *((0.9, 0.02, "faster"), (0.99, 0.02, "same"), (1.01, 0.02, "same"), (1.1, 0.02, "slower")),
        # The interval holds one, but also differences that a user would care for.
        *((1.01, 0.06, "cannot tell"), (0.97, 0.04, "cannot tell"), (1.7, 0.8, "cannot tell"), (1.7, 0.6, "slower")),
    ],
)
def test_an_interval_that_holds_one_is_no_difference_and_a_wide_one_says_nothing(
    ratio: float, spread: float, outcome: str
) -> None:
    (verdict,) = verdicts([DENSE, MOE], [row("dense", None), row("moe", ratio, spread=spread, hit=1.0)])
    assert verdict.outcome == outcome


def test_verdicts_say_what_was_read_and_why() -> None:
    rows = [row("dense", None), row("moe", 1.5, hit=0.97, flops=700), row("static", 0.75, bytes_read=700, flops=700)]
    moe, static = verdicts([DENSE, MOE, STATIC], rows)
    assert "8 tokens hit 97 % of the experts, so nearly all weights are read" in moe.why
    assert "reads 1.00 of the dense model's bytes and computes 0.70 of its operations" in moe.why
    assert "many small matrix products" in moe.why
    assert static.outcome == "faster"
    assert "50 % of the FFN is left, and the FFN is 60 % of the bytes of a dense token" in static.why
    (alone,) = verdicts(
        [DENSE, MOE], [row("dense", None), row("moe", 0.8, hit=0.25, bytes_read=800, flops=800, batch=8)]
    )
    assert "8 tokens hit 25 % of the experts; it reads 0.80" in alone.why
    assert "50 % of the FFN is active" in alone.why


def test_a_verdict_blames_nothing_for_noise() -> None:
    noisy = row("moe", 1.4, hit=0.5, bytes_read=800, flops=800, spread=0.6)
    (found,) = verdicts([DENSE, MOE], [row("dense", None), noisy])
    assert found.outcome == "cannot tell"
    assert found.why.endswith("the noise of this run is too large to tell: the 95 % interval is 0.80 to 2.00")
    near = row("moe", 1.0, hit=0.5, bytes_read=950, flops=950)
    (found,) = verdicts([DENSE, MOE], [row("dense", None), near])
    assert found.outcome == "same"
    assert found.why.endswith("the difference is within the noise of this run")


def test_a_regime_that_one_did_not_run_has_no_verdict() -> None:
    failed = Speed("moe", "eager", "decode", 8, 64, reason="no memory")
    assert verdicts([DENSE, MOE], [row("dense", None), failed]) == []
    assert verdicts([DENSE, MOE], [Speed("dense", "dense", "decode", 8, 64, reason="x"), row("moe", 1.0)]) == []
