"""`verify FILE.gguf` passes on a sound file of every kind and names the check that fails on everything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import MakeDense
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from torch import Tensor

from moeify.check.verify import VerifyReport, verify
from moeify.cli.app import run_command
from moeify.convert.pipeline import split
from moeify.errors import InputError
from moeify.options import SplitOptions

METADATA = "metadata is the dense model's"
TEXT = "text is cut into the dense model's tokens"
CARRIED = "attention, norms and embeddings are the dense ones"
NEURONS = "neurons"
ROWS = "gate and up rows are the dense ones, each once"
DOWN = "down columns follow them"
ROUTERS = "routers are float32 and finite"
TARGETS = ("granitemoeshared", "mixtral", "qwen2_moe", "glm4_moe")

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Any]


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> str:
    return str(make_dense("llama"))


@pytest.fixture(scope="module")
def made(dense: str, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each target."""
    folders = {}
    for target in TARGETS:
        folders[target] = tmp_path_factory.mktemp("sound") / target
        split(dense, folders[target], SplitOptions(target=target, tokens=1024, calibration=(str(calibration_file),)))
    return folders


def gates_on(tensors: Tensors) -> None:
    """A shared gate that is not zero, whatever was written."""
    for name in tensors:
        if name.endswith("ffn_gate_inp_shexp.weight"):
            tensors[name] = torch.full_like(tensors[name], 2.0**-20)


def failed(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize(
    ("target", "kind"),
    [*((target, Kind.Q8_0) for target in TARGETS), *(("mixtral", one) for one in (Kind.F32, Kind.BF16, Kind.Q4_0))],
)
def test_a_sound_file_passes(target: str, kind: Kind, dense: str, made: dict[str, Path], tmp_path: Path) -> None:
    report = verify(write_gguf(made[target], tmp_path / "sound.gguf", kind, change=gates_on), dense)
    assert report.passed, failed(report)
    assert [check.name for check in report.checks] == [METADATA, TEXT, CARRIED, NEURONS, ROWS, DOWN, ROUTERS]
    assert report.max_logit_difference is None


def test_a_checkpoint_of_another_type_passes(dense: str, calibration_file: Path, tmp_path: Path) -> None:
    options = SplitOptions(target="mixtral", tokens=1024, calibration=(str(calibration_file),), dtype="bfloat16")
    split(dense, tmp_path / "moe", options)
    assert verify(write_gguf(tmp_path / "moe", tmp_path / "a.gguf", Kind.Q8_0), dense).passed


def test_blocks_that_were_not_rounded_again(make_dense: MakeDense, calibration_file: Path, tmp_path: Path) -> None:
    # The dense model is of a quantised file: its numbers go into the same blocks again without a change.
    whole = make_dense("llama", seed=5)

    def rounded(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 1:
            return tensor
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), Kind.Q4_0), Kind.Q4_0))

    folder = tmp_path / "dense"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: rounded(name, tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    split(folder, tmp_path / "moe", SplitOptions(target="mixtral", tokens=1024, calibration=(str(calibration_file),)))
    assert verify(write_gguf(tmp_path / "moe", tmp_path / "a.gguf", Kind.F32), folder).passed


GATE, UP, DOWN_EXPS = (f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))


def nudge(name: str) -> Change:
    """Another last bit of float16 in one number."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[3] *= 1 + 2.0**-9

    return change


def swapped(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].flip(0)

    return change


def twice(tensors: Tensors) -> None:
    tensors[GATE][0], tensors[UP][0] = tensors[GATE][1], tensors[UP][1]


def of_one_neuron(tensors: Tensors) -> None:
    """Gate rows of one neuron, up rows of another."""
    tensors[GATE] = tensors[GATE].roll(1, dims=1)


def without_order(tensors: Tensors) -> None:
    """q as transformers has it."""
    q = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = q.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (nudge(GATE), ROWS),
        (nudge(UP), ROWS),
        (swapped(GATE), ROWS),
        (of_one_neuron, ROWS),
        (twice, ROWS),
        (swapped(DOWN_EXPS), DOWN),
        (lambda tensors: tensors[DOWN_EXPS].zero_(), DOWN),
        (lambda tensors: tensors[DOWN_EXPS].mul_(torch.inf), DOWN),
        (nudge("blk.0.attn_v.weight"), CARRIED),
        (nudge("token_embd.weight"), CARRIED),
        (nudge("output_norm.weight"), CARRIED),
        (without_order, CARRIED),
        (lambda tensors: tensors.pop("blk.1.attn_norm.weight"), CARRIED),
        (lambda tensors: tensors.update({"blk.1.attn_sinks.weight": torch.ones(4)}), CARRIED),
        (lambda tensors: tensors["blk.1.ffn_gate_inp.weight"].fill_(torch.nan), ROUTERS),
        (lambda tensors: tensors.pop("blk.0.ffn_gate_inp.weight"), ROUTERS),
        (lambda tensors: tensors.update({"rope_freqs.weight": torch.ones(4)}), METADATA),
        (lambda tensors: [tensors.pop(n) for n in (GATE, UP, DOWN_EXPS)], NEURONS),
    ],
)
def test_damage_is_found(change: Change, name: str, dense: str, made: dict[str, Path], tmp_path: Path) -> None:
    report = verify(write_gguf(made["granitemoeshared"], tmp_path / "bad.gguf", change=change), dense)
    assert name in failed(report)


@pytest.mark.parametrize(
    "metadata",
    [
        {"expert_count": 3},
        {"expert_used_count": 99},
        {"feed_forward_length": 9},
        {"expert_shared_feed_forward_length": 9},
        {"vocab_size": 9},
        {"context_length": 9},
        {"rope__freq_base": 9.0},
        {"rope__scaling__factor": 2.0},
        {"attention__layer_norm_rms_epsilon": 0.5},
        {"attention__scale": 0.5},
        {"logit_scale": 0.5},
    ],
    ids=str,
)
def test_other_metadata_is_found(metadata: dict[str, Any], dense: str, made: dict[str, Path], tmp_path: Path) -> None:
    report = verify(write_gguf(made["granitemoeshared"], tmp_path / "bad.gguf", **metadata), dense)
    assert METADATA in failed(report)
    assert report.checks[0].found.startswith(next(iter(metadata)).replace("__", "."))


def test_a_shared_gate_of_zero_is_found(dense: str, made: dict[str, Path], tmp_path: Path) -> None:
    # llama.cpp computes silu(0) / 0 of it.
    def off(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("ffn_gate_inp_shexp.weight"):
                tensors[name] = torch.zeros_like(tensors[name])

    assert failed(verify(write_gguf(made["qwen2_moe"], tmp_path / "zero.gguf", change=off), dense)) == {ROUTERS}


def test_another_tokenizer_is_found(dense: str, made: dict[str, Path], tmp_path: Path) -> None:
    file = write_gguf(made["mixtral"], tmp_path / "a.gguf")
    content = file.read_bytes()
    token = b"\x05\x00\x00\x00\x00\x00\x00\x00"
    place = content.index(token, content.index(b"tokenizer.ggml.tokens")) + len(token)
    file.write_bytes(content[:place] + b"~~~~~" + content[place + 5 :])
    report = verify(file, dense)
    assert failed(report) == {TEXT}
    assert "'~~~~~' instead of" in next(check.found for check in report.checks if not check.passed)
    place = content.index(b"gpt-2", content.index(b"tokenizer.ggml.pre"))
    file.write_bytes(content[:place] + b"qwen2" + content[place + 5 :])
    report = verify(file, dense)
    assert failed(report) == {TEXT}
    assert "pre is qwen2 instead of gpt-2" in next(check.found for check in report.checks if not check.passed)


def test_another_dense_model_is_found(make_dense: MakeDense, made: dict[str, Path], tmp_path: Path) -> None:
    file = write_gguf(made["mixtral"], tmp_path / "a.gguf")
    assert {CARRIED, ROWS, DOWN} <= failed(verify(file, make_dense("llama", seed=9)))
    with pytest.raises(InputError, match="has 2 layers of gated experts"):
        verify(file, make_dense("llama", num_hidden_layers=3))


def test_files_of_another_kind(dense: str, made: dict[str, Path], tmp_path: Path) -> None:
    file = write_gguf(made["mixtral"], tmp_path / "a.gguf")
    content = file.read_bytes()
    for length in (0, 3, 30, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(InputError):
            verify(tmp_path / "cut.gguf", dense)
    with pytest.raises(InputError, match=r"cannot read|no GGUF"):
        verify(tmp_path / "missing.gguf", dense)
    with pytest.raises(InputError, match="is a llama with no experts"):
        verify(write_gguf(made["mixtral"], tmp_path / "dense.gguf", expert_count=0), dense)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_expert_count(2)
    blocks = torch.zeros(4, 144, dtype=torch.uint8).numpy()
    writer.add_tensor("blk.0.ffn_gate_exps.weight", blocks, raw_dtype=Kind.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="Q4_K, which llama-quantize alone rounds to") as caught:
        verify(tmp_path / "k.gguf", dense)
    assert "llama-perplexity" in caught.value.hint


def test_the_command(
    dense: str,
    made: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = str(write_gguf(made["mixtral"], tmp_path / "a.gguf"))
    assert run_command(["verify", file, "--dense", dense]) == 0
    # The next step needs llama.cpp.
    monkeypatch.setattr("moeify.benchmark.engines.programs.find", lambda _: Path("llama-bench"))
    assert run_command(["verify", file, "--dense", dense]) == 0
    step = f"next: moeify bench {file} --engine llama.cpp --against {dense}"
    assert step in " ".join(capsys.readouterr().out.split())
    bad = str(write_gguf(made["mixtral"], tmp_path / "b.gguf", change=swapped(DOWN_EXPS)))
    assert run_command(["verify", bad, "--dense", dense, "--json"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["passed"] is False
    assert "export it again" in captured.err
