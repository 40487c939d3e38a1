"""What is planned for a machine, and what a split for it takes."""

from dataclasses import replace

import pytest
import torch
from conftest import MakeDense

from moeify import engines
from moeify.convert import bandwidth
from moeify.convert.bandwidth import machine_of
from moeify.convert.footprint import weights_of
from moeify.convert.machine_plan import MachinePlan, for_machine, plan_for_machine
from moeify.convert.placement import Machine, place
from moeify.convert.preview import preview
from moeify.engines import Engine, Shape
from moeify.errors import InputError, MoeifyWarning, UsageError
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.options import MachineOptions, SplitOptions

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 1024, "num_key_value_heads": 2}
RAM_ONLY = MachineOptions(vram="0", ram_bandwidth=10.0, quality=1.4)


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> DenseModel:
    return open_dense(make_dense("llama", **SIZES))


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that refuses more than 15 routed experts a token and runs experts under 64 neurons slowly."""

    def refuse(shape: Shape) -> str:
        return "too many experts a token" if shape.layout.num_routed_active > 15 else ""

    def caution(shape: Shape) -> str:
        return "narrow experts" if shape.expert_width < 64 else ""

    found = Engine("llama.cpp", "in this test", refuse, caution)
    monkeypatch.setattr(engines, "find", lambda _: found)


def test_every_candidate_is_counted_and_bounded(dense: DenseModel) -> None:
    plan = plan_for_machine(dense, RAM_ONLY)
    assert plan.machine == Machine(0, 0.0, None, 10e9)
    assert (plan.target, plan.type, plan.context) == ("granitemoeshared", "q8_0", 64)
    assert [one.kind for one in plan.candidates[:6]] == ["dense", "static", "static", "static", "static", "moe"]
    for one in plan.candidates:
        weights = weights_of(dense, one.layout, "q8_0", 64)
        assert one.read_bytes == weights.read_bytes == one.placement.ram_read_bytes
        assert one.placement == place(weights, plan.machine, routed=one.kind == "moe", context=64)
        assert one.placement.tokens_per_second == pytest.approx(10e9 / one.read_bytes)
    counts = {one.layout.num_experts for one in plan.candidates if one.layout and one.kind == "moe"}
    # 128 experts of 8 neurons and 64 of 16 fill no block of 32.
    assert counts == {8, 16, 32}
    assert {one.layout.num_shared for one in plan.candidates if one.layout and one.layout.num_active == 24} == {
        6,
        12,
        18,
    }
    assert plan.floor_bytes == weights_of(dense, None, "q8_0", 64).always_bytes
    assert plan.floor_tokens_per_second == pytest.approx(10e9 / plan.floor_bytes)


def test_the_best_is_the_fastest_within_the_quality(dense: DenseModel) -> None:
    for quality in (1.2, 1.4, 1.7, 2.2):
        plan = plan_for_machine(dense, replace(RAM_ONLY, quality=quality))
        choice = plan.choice
        assert choice is not None
        assert choice.layout is not None
        assert choice.ratio is not None
        assert choice.ratio <= quality
        assert choice.runs
        assert not choice.caution
        for one in plan.candidates:
            if one.kind == "moe" and one.is_within(quality) and not one.caution:
                assert one.placement.tokens_per_second * 0.98 <= choice.placement.tokens_per_second
    # With nothing allowed to be lost there is none, and it is said why.
    plan = plan_for_machine(dense, replace(RAM_ONLY, quality=1.0))
    assert plan.choice is None
    assert any("no layout is within 1 times the dense perplexity: the table expects 1.1" in note for note in plan.notes)


def test_what_the_engine_says_is_heard(dense: DenseModel) -> None:
    plan = plan_for_machine(dense, RAM_ONLY)
    refused = [one.layout for one in plan.candidates if one.refusal]
    assert refused
    assert all(layout is not None and layout.num_routed_active > 15 for layout in refused)
    words = f"llama.cpp does not run {len(refused)} of the layouts, such as "
    words += "24 of 32 experts with 6 shared: too many experts a token"
    assert words in plan.notes
    slow = [one for one in plan.candidates if one.caution]
    assert {one.expert_width for one in slow} == {32}
    k_quants = plan_for_machine(dense, replace(RAM_ONLY, type="q4_k"))
    narrow = next(one for one in k_quants.candidates if one.expert_width == 128 and one.kind == "moe")
    assert narrow.caution == "down_proj of 128 neurons is stored in q5_0, not q4_k"


def test_a_target_that_the_engine_lacks_is_not_taken(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find", lambda _: Engine("another", "in this test"))
    plan = plan_for_machine(dense, RAM_ONLY)
    assert plan.choice is None
    assert {one.kind for one in plan.candidates} == {"dense", "static"}
    # Told to take one that it does not know, a split says so.
    words = "no layout of .*: it does not know granitemoeshared"
    with pytest.raises(InputError, match=words):
        for_machine(dense, SplitOptions(machine="ram=10", target="granitemoeshared"))


def test_a_model_that_no_target_holds_has_dense_and_static_rows(make_dense: MakeDense) -> None:
    plan = plan_for_machine(make_dense("gpt2"), RAM_ONLY)
    assert {one.kind for one in plan.candidates} == {"dense", "static"}
    assert plan.target == ""
    assert any("no target represents the model exactly" in note for note in plan.notes)


def test_a_target_without_shared_experts_has_no_table(make_dense: MakeDense) -> None:
    plan = plan_for_machine(make_dense("mistral", **SIZES, sliding_window=16), RAM_ONLY)
    assert plan.target == "mixtral"
    assert {one.shared_share for one in plan.candidates if one.kind == "moe"} == {0.0}
    assert {one.ratio for one in plan.candidates if one.kind == "moe"} == {None}
    assert any("the table says nothing of them" in note for note in plan.notes)


def test_a_model_that_fits_nowhere_says_so(dense: DenseModel) -> None:
    plan = plan_for_machine(dense, replace(RAM_ONLY, ram="10kB"))
    assert all(one.placement.refusal.endswith("there are 10.0 kB") for one in plan.candidates)
    assert any(note.startswith("nothing fits: needs ") for note in plan.notes)
    with pytest.raises(InputError, match=r"no layout of .* on this machine: needs .* of RAM, there are 10.0 kB"):
        for_machine(dense, SplitOptions(machine="ram=10kB,ram=10"))


def test_a_context_beyond_the_model_is_refused(dense: DenseModel) -> None:
    with pytest.raises(UsageError, match="context 65 does not fit") as caught:
        plan_for_machine(dense, replace(RAM_ONLY, context=65))
    assert caught.value.hint == "--context 64"


def chosen(plan: MachinePlan) -> Layout:
    assert plan.choice is not None
    assert plan.choice.layout is not None
    return plan.choice.layout


@pytest.mark.filterwarnings("ignore::moeify.errors.MoeifyWarning")
@pytest.mark.parametrize("words", ["vram=0,ram=10", "vram=401MB,gpu=250,ram=50,quality=1.8", "vram=6GB,gpu=250,ram=50"])
def test_a_split_takes_the_best_row_of_the_plan(dense: DenseModel, words: str) -> None:
    layout = chosen(plan_for_machine(dense, MachineOptions.of_text(words)))
    options = for_machine(dense, SplitOptions(machine=words, seed=3))
    numbers = layout.num_experts, layout.num_shared, layout.num_active
    assert (options.experts, options.shared, options.active) == numbers
    assert (options.machine, options.engine, options.target, options.seed) == (None, "llama.cpp", "auto", 3)
    previewed = preview(dense, SplitOptions(machine=words))
    assert previewed.layout == layout
    assert previewed.target == "granitemoeshared"
    # What is recorded repeats the split on any machine.
    assert previewed.options.machine is None


def test_a_rival_that_is_as_fast_is_named(dense: DenseModel) -> None:
    """With all of it on the GPU static pruning to 7/8 is as good by the table and reads less than a split to 7/8."""
    with pytest.warns(MoeifyWarning, match=r"static pruning to 88% of the FFN is expected within the quality too"):
        for_machine(dense, SplitOptions(machine="vram=6GB,gpu=250,ram=50,quality=1.26"))


def test_what_is_not_told_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bandwidth, "ram_read_rate", lambda threads: threads * 5e9)
    machine = machine_of(MachineOptions(threads=1))
    assert (machine.vram_bytes, machine.ram_bytes_per_second, machine.threads) == (0, 5e9, 1)
    assert machine.ram_bytes is not None
    assert machine.measured == "RAM 5.00 GB/s on 1 thread"
    with pytest.raises(UsageError, match="4000 threads cannot be measured on"):
        machine_of(MachineOptions(threads=4000))
    assert machine_of(MachineOptions(threads=4000, ram_bandwidth=50.0)).threads == 4000
    assert machine_of(MachineOptions(ram="5GB", threads=1)).ram_bytes == 5_000_000_000
    # Of another machine, whose threads and RAM nobody knows.
    assert machine_of(MachineOptions(ram_bandwidth=50.0)) == Machine(0, 0.0, None, 50e9)
    with pytest.raises(UsageError, match="no GPU here whose bandwidth") as caught:
        machine_of(MachineOptions(vram="6GB", ram_bandwidth=50.0))
    assert "--gpu-bandwidth 250" in caught.value.hint
    with pytest.raises(UsageError, match="--gpu-bandwidth says nothing of the GPU's memory"):
        machine_of(MachineOptions(gpu_bandwidth=250.0, ram_bandwidth=50.0))


def test_ram_is_read_at_a_rate_that_is_possible() -> None:
    threads = torch.get_num_threads()
    rate = bandwidth.ram_read_rate(1, 1 << 24)
    # From a tape to more than any memory has.
    assert 1e8 < rate < 1e13
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("family", ["whisper", "bert", "vit"])
def test_what_writes_nothing_token_by_token_is_refused(family: str, make_dense: MakeDense) -> None:
    with pytest.raises(InputError, match="whose time is arithmetic for the most part") as error:
        plan_for_machine(make_dense(family), RAM_ONLY)
    assert "moeify search" in str(error.value.hint)
    assert "--budget 0.5" in str(error.value.hint)
