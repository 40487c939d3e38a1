"""A GGUF rotates as transformers does: its values go into llama.cpp's own formula, and the angles are compared."""

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moeify.errors import InputError, MoeifyWarning
from moeify.export.gguf.rotation import LONG, SHORT, add_rotation

DIM = 32
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 512,
    "short_factor": [1.0 + 0.01 * i for i in range(DIM // 2)],
    "long_factor": [2.0 + 0.5 * i for i in range(DIM // 2)],
}


def config_with(values: dict[str, Any], **more: Any) -> Any:
    return LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=dict(values), **more
    )


def written(tmp_path: Path, config: Any, architecture: str = "llama") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file has: values of the architecture, and tensors."""
    writer = gguf.GGUFWriter(tmp_path / "rotation.gguf", architecture)
    tensors = add_rotation(writer, config, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "rotation.gguf").fields
    prefix = f"{architecture}.rope."
    return {key.removeprefix(prefix): f.contents() for key, f in fields.items() if key.startswith(prefix)}, tensors


def llama_cpp(values: dict[str, Any], factors: Tensor | None) -> tuple[Tensor, float]:
    """Angle of each pair at position 1 and the factor of sine and cosine: rope_yarn of ggml-cpu/ops.cpp."""
    base, dim = values["freq_base"], values["dimension_count"]
    kind = values.get("scaling.type", "linear")
    scale = 1.0 if kind == "none" else 1.0 / values.get("scaling.factor", 1.0)
    extrapolated = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if factors is not None:
        extrapolated = extrapolated / factors.double()
    angles, size = scale * extrapolated, values.get("scaling.attn_factor", 1.0)
    if kind == "yarn":
        ends = [
            dim * math.log(values["scaling.original_context_length"] / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (32, 1)
        ]
        low, high = max(0, math.floor(ends[0])), min(dim - 1, math.ceil(ends[1]))
        ramp = 1 - ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(0.001, high - low)).clamp(0, 1)
        angles = angles * (1 - ramp) + extrapolated * ramp
        size *= 1 + 0.1 * math.log(1 / scale)
    return angles, size


@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": "default", "rope_theta": 12345.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        LLAMA3,
        YARN,
        YARN | {"attention_factor": 1.5},
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        YARN | {"beta_fast": 16, "beta_slow": 2},
        YARN | {"truncate": False},
    ],
    ids=lambda values: "-".join((values["rope_type"], *sorted(values.keys() - YARN.keys() - LLAMA3.keys()))),
)
def test_llama_cpp_turns_by_the_same_angles(values: dict[str, Any], tmp_path: Path) -> None:
    config = config_with(values)
    fields, tensors = written(tmp_path, config)
    angles, size = llama_cpp(fields, tensors.get("rope_freqs.weight"))
    kind = values["rope_type"]
    right, attention = (
        (1.0 / values["rope_theta"] ** (torch.arange(0, DIM, 2) / DIM), 1.0)
        if kind == "default"
        else ROPE_INIT_FUNCTIONS[kind](config)
    )
    torch.testing.assert_close(angles, right.double(), rtol=2e-6, atol=0)
    assert size == pytest.approx(attention, rel=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_longrope_has_two_sets(tmp_path: Path) -> None:
    config = config_with(LONGROPE)
    with pytest.warns(MoeifyWarning, match="above 512 tokens"):
        fields, tensors = written(tmp_path, config)
    assert fields["scaling.type"] == "longrope"
    assert fields["scaling.original_context_length"] == 512
    for name, length in ((SHORT, 512), (LONG, 513)):
        right, attention = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
        angles, size = llama_cpp(fields | {"scaling.type": "linear"}, tensors[name])
        torch.testing.assert_close(angles, right.double(), rtol=2e-6, atol=0)
        assert size == pytest.approx(attention, rel=1e-6)


def test_dynamic_is_as_for_short_texts(tmp_path: Path) -> None:
    values = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.warns(MoeifyWarning, match="more than 2,048 tokens"):
        fields, tensors = written(tmp_path, config_with(values))
    right, _ = ROPE_INIT_FUNCTIONS["dynamic"](config_with(values))
    torch.testing.assert_close(llama_cpp(fields, None)[0], right.double(), rtol=2e-6, atol=0)
    assert not tensors


@pytest.mark.parametrize("values", [LLAMA3, YARN | {"beta_fast": 16}, LONGROPE], ids=lambda values: values["rope_type"])
@pytest.mark.parametrize("architecture", ["qwen2moe", "qwen3moe", "glm4moe"])
def test_architectures_that_would_ignore_a_factor_are_refused(
    values: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{architecture} has no") as caught:
        written(tmp_path, config_with(values), architecture)
    assert "--target mixtral or granitemoeshared" in caught.value.hint


def test_a_part_of_each_head(tmp_path: Path) -> None:
    config = config_with({"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5})
    assert written(tmp_path, config, "glm4moe")[0]["dimension_count"] == DIM // 2
    with pytest.raises(InputError, match="16 of 32 numbers of a head rotate"):
        written(tmp_path, config)


def test_kinds_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rotary embeddings of the kind proportional"):
        written(tmp_path, config_with({"rope_type": "proportional", "rope_theta": 10000.0, "factor": 2.0}))
    config = config_with(LLAMA3)
    config.rope_parameters = {"full_attention": LLAMA3, "sliding_attention": LLAMA3}
    with pytest.raises(InputError, match="those of full_attention and sliding_attention"):
        written(tmp_path, config)
    config.rope_parameters = None
    with pytest.raises(InputError, match="this has none"):
        written(tmp_path, config)


def test_a_target_without_head_dim(tmp_path: Path) -> None:
    config = MixtralConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    assert written(tmp_path, config)[0]["dimension_count"] == DIM
