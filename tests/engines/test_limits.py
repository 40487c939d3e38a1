"""What engines refuse and what they run slowly: formulas against what was measured with the real binary."""

from typing import Any

import pytest

from moeify import engines, targets
from moeify.engines import Shape, judge
from moeify.engines.llama_cpp import NO_FLASH, most_active
from moeify.errors import UsageError
from moeify.layout import Layout

# Routed active experts that load; one more aborts. llama-bench -p 8 -n 2 of llama.cpp 0c1e570 (2026-10-01) on random
# models of hidden size 32 with so many layers.
MEASURED = {
    "granitemoeshared": {
        2: 221,
        4: 94,
        6: 52,
        8: 30,
        12: 27,
        16: 27,
        19: 21,
        22: 27,
        24: 27,
        26: 27,
        30: 27,
        34: 27,
        36: 24,
        39: 19,
        48: 27,
    },
    "mixtral": {2: 226, 4: 99, 6: 57, 8: 36, 12: 14, 16: 18, 19: 18, 24: 14, 25: 13, 30: 18, 36: 18, 48: 15, 50: 13},
    "qwen2_moe": {2: 219, 4: 92, 6: 50, 8: 43, 12: 43, 16: 43, 19: 43, 24: 43, 28: 38, 30: 43, 36: 43, 48: 43},
    "qwen3_moe": {2: 223, 4: 96, 6: 54, 8: 33, 12: 24, 16: 24, 19: 23, 24: 24, 30: 24, 36: 24, 40: 20, 48: 24},
    "glm4_moe": {2: 223, 4: 96, 6: 54, 8: 33, 12: 33, 16: 33, 19: 33, 24: 33, 30: 33, 36: 26, 48: 33},
}
# The same in 30 layers with other tensors.
VARIANTS: list[tuple[str, int, dict[str, Any], tuple[int, ...], int]] = [
    ("granitemoeshared", 27, {"tied": False}, (), 0),
    ("granitemoeshared", 32, {"qkv_bias": True}, (), 0),
    ("granitemoeshared", 31, {"qkv_bias": True, "output_bias": True}, (), 0),
    ("glm4_moe", 50, {"qkv_bias": True, "qk_norm": True}, (), 0),
    ("qwen3_moe", 34, {"qkv_bias": True, "qk_norm": True}, (), 0),
    ("glm4_moe", 43, {}, tuple(range(10)), 0),
    ("granitemoeshared", 24, {}, (), NO_FLASH),
]


def shape(target: str, layers: int, layout: Layout, **further: Any) -> Shape:
    return Shape(target, layout, layers, layout.num_experts * 64, 512, **further)


@pytest.mark.parametrize(
    ("target", "layers", "most"),
    [(target, layers, most) for target, rows in MEASURED.items() for layers, most in rows.items()],
)
def test_the_formula_meets_every_measured_limit(target: str, layers: int, most: int) -> None:
    free = 1 if targets.find(target).holds_shared else 0
    judged = shape(target, layers, Layout(256, free, 256 - free))
    assert most_active(judged) == most


@pytest.mark.parametrize(("target", "most", "tensors", "dense_layers", "nodes"), VARIANTS)
def test_further_tensors_raise_it_and_attention_without_flash_lowers_it(
    target: str, most: int, tensors: dict[str, Any], dense_layers: tuple[int, ...], nodes: int
) -> None:
    assert most_active(shape(target, 30, Layout(128, 1, 64, dense_layers), **tensors), nodes) == most


def test_without_shared_experts_granite_has_other_tensors() -> None:
    assert most_active(shape("granitemoeshared", 30, Layout(64, 0, 32))) == 17


def test_a_shape_beyond_the_limit_is_refused_with_numbers() -> None:
    [llama] = judge(shape("granitemoeshared", 30, Layout(128, 24, 96)), ["llama.cpp"])
    assert "72 routed experts for a token" in llama.refusal
    assert "room for 27 in 30 layers" in llama.refusal
    [llama] = judge(shape("granitemoeshared", 30, Layout(128, 69, 96)), ["llama.cpp"])
    assert llama.refusal == ""
    assert "aborts with flash attention off" in llama.note


def test_a_bias_on_o_is_none_of_llama_cpps_qwen3moe() -> None:
    [llama] = judge(shape("qwen3_moe", 4, Layout(8, 0, 4), output_bias=True), ["llama.cpp"])
    assert "no bias on o" in llama.refusal


@pytest.mark.parametrize(
    ("width", "slow", "noted"),
    [
        (256, {}, {}),
        (128, {}, {"llama.cpp": "K-quants fall back"}),
        (64, {}, {"llama.cpp": "K-quants fall back", "vLLM": "multiple of 128", "SGLang": "multiple of 128"}),
        (48, {"llama.cpp": "stay f16"}, {"vLLM": "tiles of 64", "SGLang": "tiles of 32"}),
        (32, {"llama.cpp": "those of 64 and more"}, {"vLLM": "tiles of 64", "SGLang": "multiple of 128"}),
    ],
)
def test_widths_are_judged(width: int, slow: dict[str, str], noted: dict[str, str]) -> None:
    verdicts = judge(Shape("granitemoeshared", Layout(8, 2, 6), 30, 8 * width, 576), ["vLLM", "SGLang", "llama.cpp"])
    assert {verdict.engine for verdict in verdicts if verdict.caution} == set(slow)
    for verdict in verdicts:
        assert not verdict.refusal
        assert slow.get(verdict.engine, "") in verdict.caution
        assert noted.get(verdict.engine, "") in verdict.note


def test_nothing_is_slow_in_a_toy() -> None:
    assert all(not v.caution for v in judge(Shape("mixtral", Layout(8, 0, 6), 2, 64, 32), ["vLLM", "llama.cpp"]))


def test_engines_are_named_as_their_makers_write_them() -> None:
    assert {engines.named(name).name for name in ("llama.cpp", "llama_cpp", "LLAMA.CPP")} == {"llama.cpp"}
    assert {engines.find(name).name for name in engines.names()} >= {"llama.cpp", "vLLM", "SGLang"}
    with pytest.raises(UsageError, match="'onnx' is not an engine") as caught:
        engines.named("onnx")
    assert "llama.cpp" in caught.value.hint


def test_what_is_no_engine_says_nothing() -> None:
    assert judge(shape("mixtral", 2, Layout(8, 0, 4)), ["everything that loads the dense model"]) == ()
