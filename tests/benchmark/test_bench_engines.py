"""`moeify bench --engine llama.cpp` with programs that are scripts: turns, ratios, and whatever may go wrong there."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_llama
import pytest
import torch
from conftest import MakeDense

from moeify.benchmark.engines import run as engine_run
from moeify.benchmark.engines.perplexity import Text, blocks, blocks_perplexity, folder_perplexity
from moeify.benchmark.engines.programs import FOLDER
from moeify.benchmark.engines.speed import Contestant, Plan, measure_speed
from moeify.benchmark.models import table as model_table
from moeify.benchmark.models.results import ModelBench
from moeify.benchmark.models.run import bench, load_bench
from moeify.benchmark.options import BenchOptions
from moeify.cli.app import run_command
from moeify.errors import DiskError, InputError, UsageError
from moeify.reporting.report import report

OPTIONS = BenchOptions(engine=("llama.cpp",), threads=(1,), prompt=(8,), tokens=64, context=32)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = fake_llama.programs(tmp_path / "programs")
    monkeypatch.setenv(FOLDER, str(folder))
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return fake_llama.write_gguf(tmp_path / "dense.gguf")


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return fake_llama.write_gguf(tmp_path / "moe.gguf", experts=6, used=2, width=8, shared=16)


def timed(programs: Path, files: list[Path], seconds: float = 20, threads: tuple[int, ...] = (1,)) -> tuple[list, dict]:
    plan = Plan(programs / "llama-bench", (8, 16), threads, 3, True, seconds)
    contestants = [Contestant(file.name, "f16", file, 0 if number else None) for number, file in enumerate(files)]
    rows, failed, version = measure_speed(contestants, plan)
    assert version in ("", "7 (abc)")
    return rows, failed


def sized(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def test_files_take_turns_and_ratios_are_of_one_round(programs: Path, tmp_path: Path) -> None:
    files = [sized(tmp_path, "dense", 100), sized(tmp_path, "half", 50)]
    rows, failed = timed(programs, files, threads=(1, 2))
    assert failed == {}
    called = fake_llama.calls(programs)
    assert [(name, threads) for name, threads, _ in called] == [
        *[("dense", "1"), ("half", "1"), ("dense", "2"), ("half", "2")],
        *[("half", "1"), ("dense", "1"), ("half", "2"), ("dense", "2")],
        *[("dense", "1"), ("half", "1"), ("dense", "2"), ("half", "2")],
    ]
    assert {prompts for *_, prompts in called} == {"8,16"}
    assert [(row.phase, row.num_tokens, row.threads, row.model) for row in rows[:5]] == [
        *[("prefill", 8, threads, model) for threads in (1, 2) for model in ("dense", "half")],
        ("prefill", 16, 1, "dense"),
    ]
    assert [row.phase for row in rows[8:]] == ["decode"] * 4
    # Each round of a script takes longer than the one before: the second is the median, and ratios know no drift.
    first = rows[0]
    assert first.ms_per_token == pytest.approx(2 * 100 * 1000 / 1e6)
    assert first.tokens_per_second == pytest.approx(5000)
    assert first.time_over_dense is None
    assert {row.num_rounds for row in rows} == {3}
    for row in rows[1::2]:
        assert row.time_over_dense == row.time_over_dense_low == row.time_over_dense_high == pytest.approx(0.5)


def test_files_that_fail_leave_and_say_why(programs: Path, tmp_path: Path) -> None:
    reasons = {
        "abort": "too many active experts a layer for its graph; it ended by SIGABRT: ggml.c:1814: GGML_ASSERT",
        "illegal": "an instruction that this CPU does not have (SIGILL)",
        "refused": "it ended with 1: llama_bench: error: failed to load model",
        "words": "it printed no JSON: hello",
        "number": "it printed no list of results: 3",
        "less": "it timed",
        "shape": "its JSON has another form than expected: KeyError('n_gen')",
    }
    rows, failed = timed(programs, [sized(tmp_path, name, 50) for name in ("dense", *reasons)])
    assert {row.model for row in rows} == {"dense"}
    assert list(failed) == list(range(1, 1 + len(reasons)))
    for reason, message in zip(failed.values(), reasons.values(), strict=True):
        assert message in reason
    called = [call[0] for call in fake_llama.calls(programs)]
    assert {name: called.count(name) for name in called} == {"dense": 3, **dict.fromkeys(reasons, 1)}


def test_a_program_that_hangs_is_stopped_with_what_it_started(programs: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    rows, failed = timed(programs, [sized(tmp_path, "hang", 1), sized(tmp_path, "half", 50)], seconds=0.5)
    assert time.monotonic() - began < 20
    assert "stopped after 0.5 s (--limit-seconds)" in failed[0]
    # There is nothing to compare with.
    assert {(row.model, row.time_over_dense) for row in rows} == {("half", None)}


def test_gguf_files_are_taken_as_they_are(
    programs: Path, dense: Path, moe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pruned = fake_llama.write_gguf(tmp_path / "pruned.gguf", width=32, file_type=7)
    words = ["bench", str(moe), "--against", str(dense), "--against", str(pruned), "--engine", "llama.cpp"]
    words += ["--threads", "1", "--prompt", "8", "--context", "32", "--tokens", "64"]
    assert run_command([*words, "--json", "-o", str(out)]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads((out / "bench.json").read_text())
    assert printed["versions"]["llama.cpp"] == "7 (abc)"
    result = load_bench(out)
    assert [(model.name, model.kind, model.active_share) for model in result.models] == [
        ("dense", "dense", 1.0),
        ("moe.gguf", "moe", 0.5),
        ("pruned.gguf", "static", 0.5),
    ]
    assert (result.models[1].num_experts, result.models[1].num_shared, result.models[1].num_active) == (8, 2, 4)
    assert [(row.type, row.perplexity, row.over_dense) for row in result.engine_files] == [
        ("f32", 12.5, None),
        ("f32", 12.5, 1.0),
        ("q8_0", 12.5, 1.0),
    ]
    assert [row.over_transformers for row in result.engine_files] == [None] * 3
    # Two regimes of three files.
    assert len(result.engine_speed) == 6
    assert result.quality == result.speed == result.verdicts == []

    assert run_command([*words, "-o", str(out), "--overwrite"]) == 0
    shown = capfd.readouterr().out
    assert "files in llama.cpp" in shown
    assert "decode 32 in llama.cpp" in shown
    page = report(out)
    text = page.out.read_text()
    assert "llama.cpp f32, 1 thread" in text
    assert "In llama.cpp f32 decode takes" in " ".join(page.headlines[0].answers.lost)


def test_what_cannot_run_is_a_row_and_no_error(programs: Path, dense: Path, moe: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"moe-{name}.gguf" for name in ("abort", "nan", "running-nan", "short", "lost")]
    for file in files:
        shutil.copy(moe, file)
    result = bench([str(file) for file in files], [str(dense)], OPTIONS)
    reasons = {row.model: row.reason for row in result.engine_files}
    assert reasons["dense"] == ""
    assert reasons["moe-abort.gguf"].startswith("cannot run: too many active experts")
    assert reasons["moe-nan.gguf"] == "no perplexity: its perplexity is nan"
    assert reasons["moe-running-nan.gguf"] == reasons["moe-nan.gguf"]
    assert reasons["moe-short.gguf"] == "no perplexity: perplexity: you need at least 64 tokens"
    # The last line is lost, the last of the running values is not.
    assert reasons["moe-lost.gguf"] == ""
    assert result.engine_files[-1].perplexity == 12.5
    assert {row.model for row in result.engine_speed} == set(reasons) - {"moe-abort.gguf"}
    notes = "\n".join(model_table.notes(result))
    assert "moe-abort.gguf (f32) in llama.cpp: cannot run" in notes


def test_folders_become_files_of_each_type(
    programs: Path, make_dense: MakeDense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, pruned = make_dense("llama", intermediate_size=64), make_dense("llama", intermediate_size=32)
    places = []

    def export(source: Path, file: Path, kind: str) -> Path:
        if kind == "q4_0" and source == pruned:
            raise InputError("rows of 8 weights", "take q8_0")
        file.write_bytes(bytes(100 if source == dense else 50))
        places.append(file)
        return file

    monkeypatch.setattr(engine_run, "_export", export)
    options = BenchOptions(**{**vars(OPTIONS), "type": ("f16", "q4_0")})
    result = bench([str(pruned)], [str(dense)], options)
    rows = {(row.model, row.type): row for row in result.engine_files}
    name = pruned.name
    assert list(rows) == [("dense", "f16"), ("dense", "q4_0"), (name, "f16"), (name, "q4_0")]
    assert rows[name, "q4_0"].reason == "no file: rows of 8 weights"
    text = Text.of("builtin-heldout", tokens=64, context=32)
    own = 12.5 / folder_perplexity(dense, text, "cpu")
    assert rows["dense", "f16"].over_transformers == rows["dense", "q4_0"].over_transformers == pytest.approx(own)
    over = {(row.model, row.type, row.phase): row.time_over_dense for row in result.engine_speed}
    assert over[name, "f16", "decode"] == pytest.approx(0.5)
    assert (name, "q4_0", "decode") not in over
    assert [model.kind for model in result.models] == ["dense", "static"]
    assert result.dtype == "f16, q4_0"
    assert not any(file.exists() for file in places)

    def full(source: Path, file: Path, kind: str) -> Path:
        raise DiskError("the disk is full", "none")

    monkeypatch.setattr(engine_run, "_export", full)
    with pytest.raises(DiskError, match="full"):
        bench([str(pruned)], [str(dense)], options)


def test_sections_can_be_left_out(programs: Path, dense: Path, moe: Path) -> None:
    def of(*skip: str) -> ModelBench:
        return bench([str(moe)], [str(dense)], BenchOptions(**{**vars(OPTIONS), "skip": skip}))

    quick = of("speed")
    assert quick.engine_speed == []
    assert quick.engine_files[0].perplexity == 12.5
    assert not (programs / "calls").exists()
    plain = of("quality")
    assert [row.perplexity for row in plain.engine_files] == [None, None]
    assert plain.engine_speed
    (programs / "llama-perplexity").unlink()
    assert of("speed").engine_files[0].reason == "no perplexity: llama-perplexity is not there"


@pytest.mark.parametrize("place", ["folder", "path"])
def test_without_the_program_nothing_is_begun(
    place: str, dense: Path, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(FOLDER, raising=False)
    if place == "folder":
        monkeypatch.setenv(FOLDER, str(tmp_path))
    message = f"llama-bench is not in {tmp_path}" if place == "folder" else "llama-bench is not on PATH"
    with pytest.raises(InputError, match=message) as caught:
        bench([str(moe)], [str(dense)], OPTIONS)
    assert FOLDER in caught.value.hint


def refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        make()


def test_files_that_do_not_compare_are_refused(programs: Path, dense: Path, moe: Path, tmp_path: Path) -> None:
    other = fake_llama.write_gguf(tmp_path / "other.gguf", experts=4, used=1, words=41)
    empty = fake_llama.write_gguf(tmp_path / "empty.gguf", width=0)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(dense.read_bytes()[:100])
    refused(lambda: bench([str(dense)], [str(moe)], OPTIONS), "8 experts a layer, a dense model is needed")
    refused(lambda: bench([str(other)], [str(dense)], OPTIONS), "vocabulary of 41, .* one of 40")
    refused(lambda: bench([str(empty)], [str(dense)], OPTIONS), "has no FFNs")
    refused(lambda: bench([str(broken)], [str(dense)], OPTIONS), "truncated or no GGUF")
    refused(lambda: bench([str(moe)], [str(dense)], BenchOptions(engine=("llama.cpp",), context=65)), "models take 64")
    refused(lambda: bench([str(moe), str(moe)], [str(dense)], OPTIONS), "named twice")
    refused(lambda: BenchOptions(engine=("vllm",)), "'vllm' is not a value of --engine")  # type: ignore[arg-type]
    refused(lambda: BenchOptions(rounds=2), "--rounds 2 is out of range")


def test_the_second_half_of_a_block_is_scored() -> None:
    class Guess(torch.nn.Module):
        """Sure of token 1 in the first half, without an idea afterwards."""

        device = torch.device("cpu")

        def forward(self, ids_1C: torch.Tensor, **_: Any) -> SimpleNamespace:
            logits_1CV = torch.zeros(*ids_1C.shape, 7)
            logits_1CV[:, : ids_1C.shape[1] // 2, 1] = 50
            return SimpleNamespace(logits=logits_1CV)

    assert blocks_perplexity(Guess(), torch.zeros(2, 8, dtype=torch.int64)) == pytest.approx(7)


def test_blocks_are_cut_as_the_program_cuts_them(make_dense: MakeDense) -> None:
    from moeify.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(make_dense("llama"))
    text = Text.of("builtin-heldout", tokens=70, context=32)
    ids_BC = blocks(tokenizer, text)
    assert ids_BC.shape == (2, 32)
    ids = tokenizer(text.text)["input_ids"]
    assert ids_BC[0, 1:].tolist() == ids[1:32]
    begins = ids[0] == tokenizer.bos_token_id
    assert ids_BC[1].tolist() == [tokenizer.bos_token_id if begins else ids[32], *ids[33:64]]
    assert blocks(tokenizer, Text("a b", 32, 2)).shape == (0, 32)
