"""A GGUF of every dense family that llama.cpp has: each number is there, under the names that its loader asks for.

That llama.cpp computes the same of them is tests/engines/test_llama_cpp.py's.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import MakeDense
from safetensors.torch import load_file
from tiny_gguf import AS_LLAMA_CPP_HAS_THEM

from moeify import families
from moeify.errors import InputError
from moeify.export.gguf.export import export_gguf
from moeify.options import ExportOptions

FAMILIES = [name for name in families.names() if families.find(name).gguf]
pytestmark = pytest.mark.filterwarnings("ignore:the tokenizer composes", "ignore:left out of the GGUF")


def exported(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    reader = gguf.GGUFReader(file)
    shapes = {one.name: tuple(int(size) for size in reversed(one.shape)) for one in reader.tensors}
    numbers = {one.name: np.asarray(one.data).view(np.float32).reshape(shapes[one.name]) for one in reader.tensors}
    return numbers, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_a_dense_model_is_in_its_gguf(family: str, make_dense: MakeDense, tmp_path: Path) -> None:
    dense = make_dense(family, **AS_LLAMA_CPP_HAS_THEM.get(family, {}))
    result = export_gguf(dense, tmp_path / "m.gguf", ExportOptions(type="f32"))
    found, keys = exported(tmp_path / "m.gguf")
    form = families.find(family).gguf
    assert form is not None
    assert keys["general.architecture"] == result.architecture == form.architecture
    known = gguf.MODEL_TENSORS[next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == form.architecture)]
    names = {gguf.TENSOR_NAMES[tensor] for tensor in known}
    assert {name.rpartition(".")[0].replace("blk.0.", "blk.{bid}.") for name in found if "blk.0" in name} <= names
    if form.own_head:
        assert np.array_equal(found.pop("output.weight"), found["token_embd.weight"])
    offset = {name: form.norm_offset if name.endswith("norm.weight") else 0.0 for name in found}
    stored = load_file(dense / "model.safetensors")

    def sums(values: list[np.ndarray]) -> list[tuple[int, float]]:
        return sorted(
            (value.size, round(float(np.sort(value.flatten()).astype(np.float64).sum()), 3)) for value in values
        )

    assert sums([value - offset[name] for name, value in found.items()]) == sums([t.numpy() for t in stored.values()])


def test_matrices_of_gpt2_are_turned_round_and_norms_of_gemma_complete(make_dense: MakeDense, tmp_path: Path) -> None:
    stored = {}
    for family in ("gpt2", "gemma"):
        dense = make_dense(family)
        export_gguf(dense, tmp_path / f"{family}.gguf", ExportOptions(type="f32"))
        stored[family] = load_file(dense / "model.safetensors"), *exported(tmp_path / f"{family}.gguf")
    numbers, found, keys = stored["gpt2"]
    for inside, name in {"attn.c_attn": "attn_qkv", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}.items():
        expected = numbers[f"transformer.h.1.{inside}.weight"].T.numpy()
        np.testing.assert_array_equal(found[f"blk.1.{name}.weight"], expected)
        np.testing.assert_array_equal(found[f"blk.1.{name}.bias"], numbers[f"transformer.h.1.{inside}.bias"].numpy())
    np.testing.assert_array_equal(found["position_embd.weight"], numbers["transformer.wpe.weight"].numpy())
    assert keys["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert not any("rope" in key for key in keys)
    numbers, found, _ = stored["gemma"]
    np.testing.assert_array_equal(found["output_norm.weight"], (numbers["model.norm.weight"] + 1).numpy())


def test_windows_caps_and_two_rotations_are_said(make_dense: MakeDense, tmp_path: Path) -> None:
    rotations = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    dense = make_dense("gemma3_text", **AS_LLAMA_CPP_HAS_THEM["gemma3_text"], rope_parameters=rotations)
    export_gguf(dense, tmp_path / "3.gguf", ExportOptions(type="f32"))
    _, keys = exported(tmp_path / "3.gguf")
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (5e5, 2e4)
    assert (keys["gemma3.attention.sliding_window"], keys["gemma3.context_length"]) == (16, 64)
    export_gguf(make_dense("gemma2"), tmp_path / "2.gguf", ExportOptions(type="f32"))
    _, keys = exported(tmp_path / "2.gguf")
    assert (keys["gemma2.attn_logit_softcapping"], keys["gemma2.final_logit_softcapping"]) == (50.0, 30.0)


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": 16}, "by the root of 8, this model by that of 16"),
        ("gemma2", {"final_logit_softcapping": None}, "it caps scores and logits"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "every other layer has a window"),
        ("gemma3_text", {}, "one of 6 layers, the last, has no window there"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "it does not cap"),
        ("smollm3", {}, "all layers but each 4th rotate there"),
        ("exaone4", {}, "models of 64 layers alone have windows"),
        ("stablelm", {"use_parallel_residual": True}, "one residual after the other"),
        ("starcoder2", {"use_bias": False}, "it adds biases everywhere"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "it divides scores by the root"),
        ("starcoder2", {"hidden_act": "gelu"}, "computes gelu_pytorch_tanh, this model has gelu"),
        (
            "starcoder2",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "numbers of a head rotate",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, values: dict[str, Any], reason: str, make_dense: MakeDense, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=reason):
        export_gguf(make_dense(family, **values), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
