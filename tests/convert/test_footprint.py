"""Bytes in a GGUF, against shapes worked out by hand and files that the gguf package sizes."""

import gguf
import pytest
from conftest import MakeDense

from moeify.convert.footprint import BLOCKS, stored_as, weights_of
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense

LAYERS, HIDDEN, NEURONS, HEADS, KEYS, VOCAB = 2, 64, 256, 4, 2, 384
SIZES = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": NEURONS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
}
HEAD_DIM = HIDDEN // HEADS
# q and o, k and v.
ATTENTION = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS * HEAD_DIM
NORMS = 2 * HIDDEN * 4


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> DenseModel:
    return open_dense(make_dense("llama", **SIZES))


def test_types_are_those_of_gguf() -> None:
    for name, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == block


def test_a_dense_llama_weighs_what_its_shapes_say(dense: DenseModel) -> None:
    vocab = int(dense.config.vocab_size)
    weights = weights_of(dense, None, "q8_0", 100)
    q8 = 34 / 32
    assert weights.num_layers == LAYERS
    assert weights.fixed_bytes == ATTENTION * q8 + NORMS
    assert weights.cache_bytes == 2 * 2 * KEYS * HEAD_DIM * 100
    assert weights.movable_bytes == weights.movable_read_bytes == 3 * HIDDEN * NEURONS * q8
    assert weights.head_bytes == vocab * HIDDEN * q8 + HIDDEN * 4
    assert weights.embedding_bytes == vocab * HIDDEN * q8
    assert weights.tied


@pytest.mark.parametrize("layout", [Layout(8, 1, 4), Layout(8, 0, 6), Layout(4, 2, 3)])
def test_experts_are_moved_and_read_by_their_number(dense: DenseModel, layout: Layout) -> None:
    width = NEURONS // layout.num_experts
    one = 3 * HIDDEN * width * 2
    weights, whole = weights_of(dense, layout, "f16", 0), weights_of(dense, None, "f16", 0)
    assert weights.movable_bytes == layout.num_routed * one
    assert weights.movable_read_bytes == layout.num_routed_active * one
    router = layout.num_routed * HIDDEN * 4
    assert weights.fixed_bytes == whole.fixed_bytes + layout.num_shared * one + router
    assert weights.head_bytes == whole.head_bytes


def test_static_pruning_is_a_narrower_dense_model(dense: DenseModel) -> None:
    static, whole = weights_of(dense, Layout(8, 6, 6), "f16", 64), weights_of(dense, None, "f16", 64)
    assert static.movable_bytes == static.movable_read_bytes == whole.movable_bytes * 6 // 8
    assert (static.fixed_bytes, static.cache_bytes) == (whole.fixed_bytes, whole.cache_bytes)


def test_rows_that_blocks_do_not_divide_take_another_type(dense: DenseModel) -> None:
    assert [stored_as(kind, 48) for kind in ("q8_0", "q4_k", "q6_k", "bf16")] == ["f16", "f16", "f16", "bf16"]
    assert [stored_as(kind, 64) for kind in ("q8_0", "q4_k", "q6_k", "q2_k")] == ["q8_0", "q5_0", "q8_0", "q4_0"]
    assert stored_as("q4_k", 512) == "q4_k"
    # Experts of 16 neurons: down_proj in f16, gate and up in q8_0.
    weights = weights_of(dense, Layout(16, 4, 8), "q8_0", 0)
    assert weights.movable_bytes == 12 * (2 * HIDDEN * 16 * 34 // 32 + HIDDEN * 16 * 2)


def test_the_head_of_k_quants_is_in_q6_k(make_dense: MakeDense) -> None:
    wide = open_dense(make_dense("llama", **{**SIZES, "hidden_size": 256, "tie_word_embeddings": False}))
    vocab = int(wide.config.vocab_size)
    weights = weights_of(wide, None, "q4_k", 0)
    assert weights.head_bytes == vocab * 210 + 256 * 4
    assert not weights.tied
    assert weights.movable_bytes == 3 * NEURONS * 144


def test_a_sliding_window_keeps_no_more(make_dense: MakeDense) -> None:
    sliding = open_dense(make_dense("mistral", **SIZES, sliding_window=16))
    assert weights_of(sliding, None, "f16", 64).cache_bytes == 2 * 2 * KEYS * HEAD_DIM * 16


@pytest.mark.parametrize("family", ["phi3", "qwen3", "gpt2", "starcoder2", "granite"])
def test_every_tensor_is_counted_once(make_dense: MakeDense, family: str) -> None:
    model = open_dense(make_dense(family))
    weights = weights_of(model, None, "f32", 0)
    table = 0 if weights.tied else weights.embedding_bytes
    biases = sum(4 * t.numel() for n, t in model.ffn_shapes.tensors().items() if "bias" in n) * model.num_layers
    total = weights.always_bytes + weights.num_layers * weights.movable_bytes + table + biases
    assert total == 4 * model.num_parameters
