"""A GGUF of a checkpoint: every tensor's name, order of rows and type; what is refused; nothing half-written."""

from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file
from torch import Tensor

import moeify
from moeify.cli.app import run_command
from moeify.errors import DiskError, InputError, UsageError
from moeify.export.gguf import quantise, writer
from moeify.export.gguf.export import export_gguf
from moeify.export.gguf.tensors import by_pairs
from moeify.options import ExportOptions, FileType, SplitOptions, untracked

HEADS = {"attn_q": 4, "attn_k": 2}
# family, target, shared experts.
SPLITS = (
    ("llama", "granitemoeshared", 1),
    ("granite", "granitemoeshared", 1),
    ("mistral", "mixtral", 0),
    ("seed_oss", "glm4_moe", 1),
    ("qwen3", "qwen3_moe", 0),
    ("phi3", "glm4_moe", 1),
)


def options(text: Path, **further: Any) -> SplitOptions:
    return SplitOptions(**{"experts": 4, "active": 3, "calibration": (str(text),), "tokens": 1024, **further})


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def values_of(tensor: Any) -> np.ndarray:
    numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return numbers.reshape(tuple(int(size) for size in reversed(tensor.shape)))


def keys_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def stored(folder: Path) -> dict[str, Tensor]:
    parts = [load_file(file) for file in folder.glob("model*.safetensors")]
    return {name: tensor.float() for part in parts for name, tensor in part.items()}


def unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `by_pairs`, written another way: even rows of a head first."""
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    return np.concatenate([by_head[:, 0::2], by_head[:, 1::2]], axis=1).reshape(rows.shape)


@pytest.fixture(scope="session")
def granite_moe(make_dense: MakeDense, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("granite-moe") / "moe"
    moeify.split(make_dense("llama", hidden_size=64), out, options(calibration_file))
    return out


@pytest.mark.parametrize(("family", "target", "shared"), SPLITS)
def test_every_number_of_a_split_is_in_its_gguf(
    family: str, target: str, shared: int, make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    chosen = options(calibration_file, target=target, shared=shared, refit=False)
    result = moeify.split(make_dense(family), tmp_path / "moe", chosen, gguf=file, export=ExportOptions(type="f32"))
    assert result.gguf is not None
    found = tensors_of(file)
    assert result.gguf.num_entries == len(found)
    numbers = {name: values_of(tensor) for name, tensor in found.items()}
    if result.gguf.architecture in ("llama", "granitemoe"):
        for name, heads in HEADS.items():
            for layer in range(2):
                key = f"blk.{layer}.{name}.weight"
                numbers[key] = unpaired(numbers[key], heads)
    # Each row of the checkpoint is a row of the GGUF, as often as there.
    rows = [row for tensor in stored(tmp_path / "moe").values() for row in tensor.reshape(-1, tensor.shape[-1])]
    expected = sorted(row.numpy().tobytes() for row in rows)
    assert expected == sorted(row.tobytes() for value in numbers.values() for row in value.reshape(-1, value.shape[-1]))


def test_granite_tensors_have_llama_cpps_names_and_orders(granite_moe: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    result = export_gguf(granite_moe, file, ExportOptions(type="f16"))
    found, numbers = tensors_of(file), stored(granite_moe)
    block = "model.layers.1."
    inputs = numbers[f"{block}block_sparse_moe.input_linear.weight"]
    shared = numbers[f"{block}shared_mlp.input_linear.weight"]
    pairs = {
        "token_embd.weight": numbers["model.embed_tokens.weight"],
        "output_norm.weight": numbers["model.norm.weight"],
        "blk.1.attn_q.weight": by_pairs(numbers[f"{block}self_attn.q_proj.weight"], 4),
        "blk.1.attn_k.weight": by_pairs(numbers[f"{block}self_attn.k_proj.weight"], 2),
        "blk.1.attn_v.weight": numbers[f"{block}self_attn.v_proj.weight"],
        "blk.1.ffn_gate_exps.weight": inputs[:, :16],
        "blk.1.ffn_up_exps.weight": inputs[:, 16:],
        "blk.1.ffn_down_exps.weight": numbers[f"{block}block_sparse_moe.output_linear.weight"],
        "blk.1.ffn_gate_shexp.weight": shared[:16],
        "blk.1.ffn_up_shexp.weight": shared[16:],
        "blk.1.ffn_gate_inp.weight": numbers[f"{block}block_sparse_moe.router.layer.weight"],
    }
    for name, value in pairs.items():
        kept = "norm" in name or "gate_inp" in name
        assert found[name].tensor_type.name == ("F32" if kept else "F16"), name
        expected = value.numpy() if kept else value.numpy().astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(values_of(found[name]), expected, name)
    keys = keys_of(file)
    assert keys["general.architecture"] == result.architecture == "granitemoe"
    assert (keys["granitemoe.expert_count"], keys["granitemoe.expert_used_count"]) == (3, 2)
    assert keys["granitemoe.expert_shared_feed_forward_length"] == 16
    assert keys["granitemoe.attention.scale"] == pytest.approx(0.25)
    assert keys["moeify.version"] == moeify.__version__
    assert "tokenizer.ggml.tokens" in keys
    assert "granitemoe.rope.freq_base" in keys


def test_a_name_does_not_make_llama_cpp_look_for_tokens_that_are_not_there(granite_moe: Path, tmp_path: Path) -> None:
    (tmp_path / "My-Phi-3-mini").symlink_to(granite_moe)
    export_gguf(tmp_path / "My-Phi-3-mini", tmp_path / "m.gguf")
    assert keys_of(tmp_path / "m.gguf")["general.name"] == "My-Phi 3-mini"


def test_rows_that_are_no_whole_blocks_are_said_and_stored_as_f16(granite_moe: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.warns(moeify.errors.MoeifyWarning, match=r"ffn_down_exps.weight and ffn_down_shexp.weight .* q8_0"):
        result = export_gguf(granite_moe, file, ExportOptions(type="q8_0"))
    found = tensors_of(file)
    assert result.fallback == ("ffn_down_exps.weight", "ffn_down_shexp.weight")
    assert 0 < result.fallback_share < 0.5
    assert found["blk.0.ffn_down_exps.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q8_0"
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"


def test_the_types_are_those_of_the_options() -> None:
    assert set(quantise.TYPES) == set(get_args(FileType))


@pytest.mark.parametrize("name", quantise.TYPES)
def test_each_type_is_read_back_within_its_error(name: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense("llama", hidden_size=64)
    export_gguf(dense, tmp_path / "m.gguf", ExportOptions(type=name))
    value = stored(dense)["model.layers.0.mlp.down_proj.weight"].numpy()
    found = tensors_of(tmp_path / "m.gguf")["blk.0.ffn_down.weight"]
    limit = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 2e-2, "q5_0": 0.1, "q5_1": 0.1, "q4_0": 0.2, "q4_1": 0.2}
    assert found.tensor_type.name.lower() == name
    assert np.linalg.norm(values_of(found) - value) <= limit[name] * np.linalg.norm(value)


def test_the_same_checkpoint_gives_the_same_bytes_in_small_pieces(
    granite_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_gguf(granite_moe, tmp_path / "a.gguf")
    monkeypatch.setattr("moeify.export.gguf.tensors.PIECE_NUMBERS", 200)
    export_gguf(granite_moe, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.filterwarnings("ignore:the tokenizer composes", "ignore:left out of the GGUF")
def test_a_shared_gate_of_zeros_is_refused(make_dense: MakeDense, calibration_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moe"
    moeify.split(make_dense("qwen2"), folder, options(calibration_file, target="qwen2_moe", refit=False))
    shard = next(folder.glob("model-*.safetensors"))
    tensors = load_file(shard)
    gates = [name for name in tensors if name.endswith("shared_expert_gate.weight")]
    for value in (0.0, 2.0**-20):
        for name in gates:
            tensors[name].fill_(value)
        save_file(tensors, shard, {"format": "pt"})
        if value == 0:
            with pytest.raises(InputError, match="is all zero"):
                export_gguf(folder, tmp_path / "m.gguf")
    export_gguf(folder, tmp_path / "m.gguf")
    assert tensors_of(tmp_path / "m.gguf")["blk.1.ffn_gate_inp_shexp.weight"].tensor_type.name == "F32"
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["qwen2moe.expert_shared_feed_forward_length"] == keys["qwen2moe.expert_feed_forward_length"] == 16


@pytest.mark.filterwarnings("ignore:the tokenizer composes", "ignore:left out of the GGUF")
def test_a_static_checkpoint_is_exported(make_dense: MakeDense, calibration_file: Path, tmp_path: Path) -> None:
    dense, folder = make_dense("qwen2"), tmp_path / "static"
    result = moeify.split(
        dense, folder, SplitOptions(static=True, active=2, experts=4, calibration=(str(calibration_file),), tokens=1024)
    )
    assert result.gguf is None
    done = export_gguf(folder, tmp_path / "m.gguf")
    assert done.architecture == "qwen2"
    assert keys_of(done.file)["qwen2.feed_forward_length"] == 32
    assert tensors_of(done.file)["blk.0.ffn_up.weight"].shape.tolist() == [32, 32]


def test_llama_quantizes_types_are_refused_with_its_command(granite_moe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows of 16 and 64 numbers are not multiples of 256") as caught:
        export_gguf(granite_moe, tmp_path / "m.gguf", ExportOptions(type="q4_k_m"))
    assert f"llama-quantize {tmp_path / 'm-f16.gguf'} {tmp_path / 'm.gguf'} Q4_K_M" in caught.value.hint
    with pytest.raises(UsageError, match="--type q9_9 is unknown"):
        export_gguf(granite_moe, tmp_path / "m.gguf", ExportOptions(type="q9_9"))
    assert not list(tmp_path.iterdir())


def test_only_a_file_of_moeifys_is_replaced(granite_moe: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    export_gguf(granite_moe, file)
    with pytest.raises(InputError, match="exists"):
        export_gguf(granite_moe, file)
    assert export_gguf(granite_moe, file, ExportOptions(type="f32"), overwrite=True).type == "f32"
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"GGUF of somebody else")
    with pytest.raises(InputError, match="no gguf file that moeify wrote"):
        export_gguf(granite_moe, foreign, overwrite=True)
    assert foreign.read_bytes() == b"GGUF of somebody else"
    with pytest.raises(UsageError, match="inside of the checkpoint"):
        export_gguf(granite_moe, granite_moe / "m.gguf")


def test_a_killed_or_failed_export_leaves_nothing(
    granite_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(items: Any, label: str, total: int) -> Any:
        yield from list(items)[: total // 2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(granite_moe, tmp_path / "m.gguf", track=fail)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("moeify.export.gguf.export.HEADER_BYTES", 1 << 60)
    with pytest.raises(DiskError, match="are needed"):
        export_gguf(granite_moe, tmp_path / "m.gguf")


def test_values_that_do_not_fit_are_refused(granite_moe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in granite_moe.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = next(folder.glob("model-*.safetensors"))
    tensors = load_file(shard)
    for value, words in ((1e6, "reaches to 65,504"), (float("nan"), "NaN")):
        tensors["model.layers.0.self_attn.v_proj.weight"][3, 5] = value
        save_file(tensors, shard, {"format": "pt"})
        with pytest.raises(InputError, match=words):
            export_gguf(folder, tmp_path / "m.gguf", ExportOptions(type="f16"))
        assert not (tmp_path / "m.gguf").exists()


def test_an_architecture_that_llama_cpp_does_not_have_is_refused_before_the_split(
    make_dense: MakeDense, calibration_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no GGUF is written of helium models"):
        export_gguf(make_dense("helium"), tmp_path / "m.gguf")
    gelu = make_dense("llama", hidden_act="gelu")
    with pytest.raises(InputError, match="computes silu, this model has gelu"):
        moeify.split(gelu, tmp_path / "moe", options(calibration_file), gguf=tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_sliding_window_limits_the_context(make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense("mistral", sliding_window=32)
    with pytest.warns(moeify.errors.MoeifyWarning, match="has no sliding window"):
        export_gguf(dense, tmp_path / "m.gguf")
    assert keys_of(tmp_path / "m.gguf")["llama.context_length"] == 32


def test_the_command_prints_a_table_json_and_errors(
    granite_moe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.gguf"
    assert run_command(["export", str(granite_moe), "--gguf", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "granitemoe" in shown
    assert f"next: moeify verify {file} --dense" in shown
    assert run_command(["export", str(granite_moe), "--gguf", str(file), "--overwrite", "--json"]) == 0
    assert '"schema": "moeify.export/1"' in capsys.readouterr().out
    assert run_command(["export", str(granite_moe), "--gguf", str(file)]) == 3
    assert run_command(["export", str(granite_moe), "--gguf", str(file), "--overwrite", "--type", "q6_k"]) == 2
    assert run_command(["split", str(granite_moe), "--type", "q8_0"]) == 2
    assert "--gguf" in capsys.readouterr().err


def test_pairs_are_the_rows_that_rotate_together() -> None:
    rows = torch.arange(16)[:, None] * torch.ones(1, 3)
    assert by_pairs(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert by_pairs(rows[:, 0], 2).tolist() == by_pairs(rows, 2)[:, 0].tolist()


def test_a_tensor_of_another_length_than_announced_is_a_bug(tmp_path: Path) -> None:
    broken = writer.Planned("x", (4,), gguf.GGMLQuantizationType.F32, 16, lambda: [np.zeros(3, np.uint8)])
    with pytest.raises(AssertionError, match="announced were 16"):
        writer.write(tmp_path / "m.gguf", gguf.GGUFWriter(None, "llama"), [broken], untracked)
    assert not list(tmp_path.iterdir())
