"""`moeify bench` on tiny converted models: the whole road, what it refuses, its gate, its tables and its JSON."""

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense
from torch import Tensor

from moeify import BenchOptions
from moeify.benchmark.models import table as model_table
from moeify.benchmark.models.memory import Memory
from moeify.benchmark.models.results import ModelBench
from moeify.benchmark.models.run import bench, load_bench
from moeify.cli.app import run_command
from moeify.errors import InputError, UsageError
from moeify.models.builtin import BuiltinRecipe, train_tokenizer
from moeify.plan import load_plan

Split = Callable[..., Path]
QUICK = ["--tokens", "256", "--context", "32", "--batch", "1,2", "--prompt", "8", "--seconds-per-row", "0.001"]
QUICK += ["--device", "cpu"]
OPTIONS: dict[str, Any] = {"tokens": 256, "context": 32, "batch": (1,), "prompt": (8,), "seconds_per_row": 0.001}


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", intermediate_size=128, max_position_embeddings=64)


@pytest.fixture(scope="module")
def split(dense: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """split(name, *options) -> folder of that name."""
    folder = tmp_path_factory.mktemp("split")

    def make(name: str, *options: str) -> Path:
        text = ["--calibration", str(calibration_file), "--tokens", "1024", "--experts", "8", "--active", "4"]
        if not (folder / name).exists():
            assert run_command(["split", str(dense), *text, *options, "-o", str(folder / name), "--quiet"]) == 0
        return folder / name

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, calibration_file: Path) -> str:
    path = tmp_path_factory.mktemp("bench") / "text.txt"
    path.write_text(calibration_file.read_text()[:3000])
    return str(path)


@pytest.fixture(scope="module")
def result(dense: Path, split: Split, text: str, tmp_path_factory: pytest.TempPathFactory) -> ModelBench:
    """Everything, on one MoE and a pruned control; tests of speed start the process that measures memory."""
    options = BenchOptions(data=(text,), **{**OPTIONS, "batch": (1, 2)}, roofline=True, device="cpu")
    out = tmp_path_factory.mktemp("result")
    asked = [str(split("moe"))], [str(dense), str(split("pruned", "--static"))]

    def memory(path: Path, inputs: Mapping[str, Tensor], *, writes: bool, dtype: str, device: str) -> Memory:
        assert (tuple(inputs["input_ids"].shape), writes, dtype, device) == ((2, 8), True, "float32", "cpu")
        return Memory(1000, None, "out of memory") if path.name == "moe" else Memory(1000, 2000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("moeify.benchmark.models.run"), "measure_memory", memory)
        found = bench(*asked, options, out=out)
    assert load_bench(out) == found
    return found


def run(*arguments: str) -> int:
    return run_command(["bench", *arguments])


def test_everything_is_measured(result: ModelBench) -> None:
    assert [(model.name, model.kind) for model in result.models] == [
        ("dense", "dense"),
        ("moe", "moe"),
        ("pruned", "static"),
    ]
    assert [row.model for row in result.quality] == ["dense", "moe", "pruned"]
    assert [list(sample.continuations) for sample in result.samples] == [["dense", "moe", "pruned"]] * 2
    # Eager, batched_mm, grouped_mm and ours; two batch sizes, prefill and decode.
    assert len(result.speed) == (1 + 4 + 1) * 2 * 2
    assert not any(row.reason for row in result.speed)
    assert {(row.model, row.phase, row.batch) for row in result.verdicts} == {
        (model, phase, batch) for model in ("moe", "pruned") for phase in ("prefill", "decode") for batch in (1, 2)
    }
    assert list(result.experts) == ["moe"]
    assert [layer.layer for layer in result.experts["moe"]] == [0, 1]
    assert result.ceilings is not None
    assert all(row.time_over_floor is not None for row in result.speed)
    assert [model.load_peak_memory_bytes for model in result.models] == [1000] * 3
    assert [model.peak_memory_bytes for model in result.models] == [2000, None, 2000]
    assert "moe: memory not known, out of memory" in model_table.notes(result)
    assert (result.dtype, result.context) == ("float32", 32)
    assert result.command.startswith("moeify bench ")
    assert " --batch 1,2 --prompt 8 --roofline --seconds-per-row 0.001 --device cpu --against " in result.command


@pytest.mark.parametrize("target", ["granitemoeshared", "qwen2_moe", "mixtral"])
def test_sizes_are_what_the_conversion_wrote(target: str, dense: Path, split: Split, text: str) -> None:
    shared = ["--shared", "0"] if target == "mixtral" else []
    folder = split(target, "--target", target, *shared)
    options = BenchOptions(data=(text,), **OPTIONS, skip=("quality", "speed", "memory", "experts"))
    found = bench([str(folder)], [str(dense)], options).models[1]
    record, layout = json.loads((folder / "moeify.json").read_text()), load_plan(folder).layout
    assert sum(part.parameters for part in found.parts.values()) == record["parameters"]
    assert sum(part.active_parameters for part in found.parts.values()) == record["active_parameters"]
    assert (found.num_experts, found.num_shared, found.num_active) == (8, layout.num_shared, 4)
    assert found.active_share == layout.active_share == 0.5
    assert found.bytes_on_disk == sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def test_tasks_stand_beside_the_dense_model(dense: Path, split: Split, text: str, tmp_path: Path) -> None:
    rows = [{"question": f"It is {n}", "choices": [f"{n * n} a", "names"], "answer": n % 2} for n in range(100)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = BenchOptions(
        data=(text,), **OPTIONS, tasks=(str(tmp_path / "q.jsonl"),), skip=("quality", "speed", "memory", "experts")
    )
    found = bench([str(split("moe"))], [str(dense)], options, out=tmp_path)
    assert [(row.model, row.metric) for row in found.tasks] == [
        (model, metric) for model in ("dense", "moe") for metric in ("acc", "acc_norm")
    ]
    assert load_bench(tmp_path).tasks == found.tasks
    (grid,) = (grid for grid in model_table.grids(found) if grid.title.startswith("tasks"))
    assert grid.title == "tasks, questions: 100 of q.jsonl"
    assert [line[:2] for line in grid.lines][:2] == [("q.jsonl acc", "dense"), ("q.jsonl acc", "moe")]
    with pytest.raises(UsageError, match="--tasks are answered in transformers"):
        BenchOptions(engine=("llama.cpp",), tasks=("q.jsonl",))


def test_layers_that_stayed_dense_are_counted(dense: Path, split: Split, text: str) -> None:
    folder = split("half", "--target", "qwen2_moe", "--dense-layers", "0")
    options = BenchOptions(data=(text,), **OPTIONS, skip=("quality", "speed", "memory"))
    found = bench([str(folder)], [str(dense)], options)
    assert found.models[1].active_share == load_plan(folder).layout.model_share(2) == 0.75
    assert [layer.layer for layer in found.experts["half"]] == [1]
    assert found.speed == found.quality == found.verdicts == []


def test_tables_show_every_row_and_verdicts_come_last(result: ModelBench, capfd: pytest.CaptureFixture[str]) -> None:
    grids = {grid.title: grid for grid in model_table.grids(result)}
    assert next(iter(grids)) == "compression"
    for batch in (1, 2):
        for phase in ("prefill", "decode"):
            # The mixture on transformers' three implementations and on ours, the dense and the pruned model.
            assert len(grids[f"{phase} {batch} x 8"].lines) == 6
    for grid in grids.values():
        assert {len(line) for line in grid.lines} == {len(grid.columns)}
    lines = model_table.verdict_lines(result)
    assert len(lines) == len(result.verdicts)
    assert all(verdict.why in line for verdict, line in zip(result.verdicts, lines, strict=True))


def test_command_line(dense: Path, split: Split, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [str(split("moe")), "--against", str(dense), "--data", text, *QUICK, "--implementation", "eager"]
    out = tmp_path / "out"
    assert run(*words, "--skip", "memory", "-o", str(out)) == 0
    shown = capfd.readouterr().out
    assert shown.splitlines()[-1] == f"next: moeify report {out}"
    assert (
        shown.index("compression") < shown.index("quality on") < shown.index("prefill 1 x 8") < shown.index("verdicts")
    )
    stored = json.loads((out / "bench.json").read_text())
    assert stored["schema"] == "moeify.bench/1"
    assert run(*words, "-o", str(out)) == 3
    assert "--overwrite" in capfd.readouterr().err
    assert run(*words, "--skip", "memory", "--json", "--dtype", "bfloat16", "-o", str(out), "--overwrite") == 0
    found = json.loads(capfd.readouterr().out)
    assert found == json.loads((out / "bench.json").read_text())
    assert found["dtype"] == "bfloat16"
    assert {row["implementation"] for row in found["speed"]} == {"dense", "eager"}


def test_the_gate(dense: Path, split: Split, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Equal passes; an earlier run that was much faster on purpose does not, and the result is there all the same."""
    words = [str(split("moe")), "--against", str(dense), "--data", text, *QUICK, "--implementation", "eager"]
    old, file = tmp_path / "old", tmp_path / "old" / "bench.json"
    assert run(*words, "--skip", "memory", "--skip", "experts", "-o", str(old), "--quiet") == 0
    assert run(*words, "--skip", "memory", "--skip", "speed", "--skip", "experts", "--baseline", str(file)) == 0
    shown = capfd.readouterr().out
    assert "0 of 4 numbers worse" in " ".join(shown.split())
    assert "only in" in shown

    values = json.loads(file.read_text())
    for row in values["speed"]:
        if row["time_over_dense"] is not None:
            row |= {"time_over_dense": 1e-4, "time_over_dense_low": 1e-5, "time_over_dense_high": 1e-3}
    file.write_text(json.dumps(values))
    again = [*words, "--skip", "memory", "--skip", "experts", "--baseline", str(old), "--threshold", "1.5"]
    assert run(*again, "-o", str(tmp_path / "new"), "--json") == 4
    out, err = capfd.readouterr()
    assert "4 numbers are worse" in err
    found = json.loads(out)["regressions"]
    assert [change["what"] for change in found["changes"] if change["worse"]] == ["time over dense"] * 4
    assert (tmp_path / "new" / "bench.json").is_file()

    file.write_text(json.dumps({**values, "schema": "moeify.layer-bench/1"}))
    assert run(*again) == 3
    assert "has schema moeify.layer-bench/1, expected moeify.bench/1" in capfd.readouterr().err
    file.write_text(json.dumps({**values, "models": values["models"][:1], "quality": [], "speed": []}))
    assert run(*again) == 3
    assert "no row in common" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "moeify bench needs MODELS..."),
        (["moe"], "moeify bench needs --against MODEL,..."),
        (["moe", "--against", "dense", "--against", "moe"], "moe is named twice"),
        (["moe", "--against", "dense", "--batch", "many"], "--batch many: expected whole numbers"),
        (["moe", "--against", "dense", "--batch", ""], "--batch is empty"),
        (["moe", "--against", "dense", "--prompt", "0"], "--prompt 0 is out of range"),
        (["moe", "--against", "dense", "--tokens", "1,2"], "--tokens 1,2: expected a whole number"),
        (["moe", "--against", "dense", "--skip", "everything"], "'everything' is not a value of --skip"),
        (["moe", "--against", "dense", "--implementation", "fast"], "'fast' is not a value of --implementation"),
        (["moe", "--against", "dense", "--threshold", "0.5"], "threshold 0.5 is less than one"),
        (["moe", "--against", "dense", "--cases", "64x256-8/2"], "'--cases' is not an option of moeify bench"),
    ],
    ids=" ".join,
)
def test_what_does_not_fit_together_is_refused(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err


def test_models_and_texts_that_do_not_compare_are_refused(
    dense: Path, make_dense: MakeDense, split: Split, text: str, tmp_path: Path
) -> None:
    moe, options = str(split("moe")), BenchOptions(data=(text,), **OPTIONS)
    with pytest.raises(InputError, match="no model at"):
        bench(["./nothing"], [str(dense)], options)
    with pytest.raises(InputError, match="7 experts a layer, a dense model is needed"):
        bench([str(dense)], [moe], options)
    with pytest.raises(InputError, match="vocabulary of"):
        bench([moe], [str(make_dense("llama", vocab_size=500))], options)
    other = tmp_path / "other"
    shutil.copytree(moe, other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no usable tokenizer"):
        bench([str(other)], [str(dense)], options)
    train_tokenizer(BuiltinRecipe(vocab_size=300, context=64), ["a b c d e f"] * 3).save_pretrained(other)
    with pytest.raises(InputError, match="different tokens"):
        bench([str(other)], [str(dense)], options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 65}, "--context asks for 65 positions, all models take 64"),
        ({"prompt": (64,)}, "--prompt asks for 65 positions"),
        ({"tokens": 40}, "gives 40 tokens, less than 2 blocks of 32"),
        ({"batch": (1000,)}, "a batch of prompts needs 9,000"),
    ],
)
def test_texts_that_are_too_short_are_refused(
    changes: dict[str, Any], message: str, dense: Path, split: Split, text: str
) -> None:
    with pytest.raises(InputError, match=message):
        bench([str(split("moe"))], [str(dense)], BenchOptions(data=(text,), **{**OPTIONS, **changes}))


def test_an_option_that_is_no_size_is_refused() -> None:
    for options in ({"data": ()}, {"batch": ()}, {"tokens": 0}):
        with pytest.raises(UsageError):
            BenchOptions(**options)


def test_names_are_unique(dense: Path, split: Split, text: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "moe", tmp_path / "b" / "dense"
    for folder in (first, second):
        shutil.copytree(split("moe"), folder)
    options = BenchOptions(data=(text,), **OPTIONS, skip=("quality", "speed", "memory", "experts"))
    found = bench([str(first), str(second), str(split("moe"))], [str(dense)], options)
    assert [model.name for model in found.models] == ["dense", str(first), str(second), str(split("moe"))]
    # Without a length of its own a prompt is as long as the models allow.
    assert bench([str(first)], [str(dense)], BenchOptions(data=(text,), tokens=256, skip=options.skip)).context == 64
