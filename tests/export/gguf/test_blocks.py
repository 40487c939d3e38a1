"""A split of a GGUF keeps its blocks: bit by bit where only the order of rows changed, anew where numbers changed."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import MakeDense
from safetensors.torch import load_file, save_file

import moeify
from moeify.errors import InputError
from moeify.export.gguf.export import export_gguf
from moeify.export.gguf.tensors import by_pairs
from moeify.options import ExportOptions, SplitOptions
from moeify.plan import SHARED, SplitPlan


def tensors_of(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def source(make_dense: MakeDense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama at Q4_0."""
    file = tmp_path_factory.mktemp("source") / "dense.gguf"
    dense = make_dense("llama", hidden_size=64, intermediate_size=128, rms_norm_eps=1e-5)
    export_gguf(dense, file, ExportOptions(type="q4_0"))
    return file


@pytest.fixture(scope="module")
def split_of(source: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """split_of(target, shared) -> its folder and GGUF, and the result; made once."""
    made: dict[str, Any] = {}

    def make(target: str, shared: int) -> Any:
        if target not in made:
            folder = tmp_path_factory.mktemp(target)
            text = (str(calibration_file),)
            chosen = SplitOptions(4, shared, 3, target=target, calibration=text, tokens=1024)
            made[target] = moeify.split(source, folder / "moe", chosen, gguf=folder / "moe.gguf")
        return made[target]

    return make


def rows_of(plan: SplitPlan, layer: int, experts: Any) -> np.ndarray:
    return torch.cat([plan.layers[layer].neurons(expert) for expert in experts]).numpy()


@pytest.mark.parametrize(("target", "shared"), [("granitemoeshared", 1), ("mixtral", 0), ("glm4_moe", 1)])
def test_rows_are_the_sources_blocks_in_another_order(target: str, shared: int, source: Path, split_of: Any) -> None:
    result = split_of(target, shared)
    dense, cut = tensors_of(source), tensors_of(result.gguf.file)
    raw = 0
    for layer in range(2):
        routed = rows_of(result.plan, layer, range(result.layout.num_routed))
        always = rows_of(result.plan, layer, [SHARED])
        for part in ("gate", "up"):
            blocks = dense[f"blk.{layer}.ffn_{part}.weight"].data
            experts = cut[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert experts.tensor_type.name == "Q4_0"
            np.testing.assert_array_equal(experts.data.reshape(-1, blocks.shape[1]), blocks[routed])
            raw += 1
            if shared:
                np.testing.assert_array_equal(cut[f"blk.{layer}.ffn_{part}_shexp.weight"].data, blocks[always])
                raw += 1
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            blocks, taken = dense[f"blk.{layer}.{part}.weight"].data, cut[f"blk.{layer}.{part}.weight"].data
            if target == "glm4_moe" and part in ("attn_q", "attn_k"):
                # llama.cpp rotates halves there, and pairs in a llama.
                taken = by_pairs(torch.from_numpy(taken.copy()), 4 if part == "attn_q" else 2).numpy()
            np.testing.assert_array_equal(taken, blocks)
            raw += 1
    embedding = dense["token_embd.weight"].data
    for name in ("token_embd.weight", *(["output.weight"] if target == "glm4_moe" else [])):
        np.testing.assert_array_equal(cut[name].data, embedding)
        raw += 1
    assert result.gguf.num_raw == raw
    assert result.gguf.type == "q4_0"
    assert 0.5 < result.gguf.raw_share < 1


def test_the_tokenizer_is_the_sources(source: Path, split_of: Any) -> None:
    def keys(file: Path) -> dict[str, Any]:
        fields = gguf.GGUFReader(file).fields
        return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}

    assert keys(split_of("granitemoeshared", 1).gguf.file) == keys(source)


def test_down_proj_is_quantised_anew_to_the_sources_type(split_of: Any) -> None:
    result = split_of("granitemoeshared", 1)
    cut = tensors_of(result.gguf.file)
    parts = [load_file(file) for file in result.out.glob("model-*.safetensors")]
    down = "model.layers.1.block_sparse_moe.output_linear.weight"
    (value,) = (part[down] for part in parts if down in part)
    found = cut["blk.1.ffn_down_exps.weight"]
    assert found.tensor_type.name == "Q4_0"
    numbers = gguf.quants.dequantize(found.data, found.tensor_type).reshape(value.shape)
    assert np.linalg.norm(numbers - value.numpy()) < 0.15 * np.linalg.norm(value.numpy())


@pytest.mark.filterwarnings("ignore:left out of the GGUF")
def test_what_was_trained_since_is_quantised_anew(split_of: Any, tmp_path: Path) -> None:
    result = split_of("granitemoeshared", 1)
    folder = tmp_path / "trained"
    folder.mkdir()
    for path in result.out.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = next(folder.glob("model-*.safetensors"))
    tensors = load_file(shard)
    tensors["model.layers.0.block_sparse_moe.input_linear.weight"][0, 0, 0] += 2**-12
    save_file(tensors, shard, {"format": "pt"})
    trained = export_gguf(folder, tmp_path / "trained.gguf")
    # gate_exps alone: up is the other half of that matrix.
    assert trained.num_raw == result.gguf.num_raw - 1
    assert tensors_of(trained.file)["blk.0.ffn_gate_exps.weight"].tensor_type.name == "Q4_0"
    assert export_gguf(folder, tmp_path / "q8.gguf", ExportOptions(type="q8_0")).num_raw == 0


def test_a_source_that_is_damaged_is_an_error(split_of: Any, source: Path, tmp_path: Path) -> None:
    result, content = split_of("granitemoeshared", 1), source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    try:
        with pytest.raises(InputError):
            export_gguf(result.out, tmp_path / "m.gguf")
    finally:
        source.write_bytes(content)
    assert not list(tmp_path.iterdir())
