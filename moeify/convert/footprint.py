"""How many bytes a model takes in a GGUF file of a type, and how many of them a token reads.

Legend: R routed experts, f neurons of one expert, D hidden size.
"""

import math
from collections.abc import Mapping

from moeify.convert.placement import BATCH_TOKENS, Weights
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.options import GGUFType

# Of gguf.GGML_QUANT_SIZES: weights in a block, and its bytes.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "q6_k": (256, 210),
    "q5_k": (256, 176),
    "q4_k": (256, 144),
    "q3_k": (256, 110),
    "q2_k": (256, 84),
}
# What llama-quantize takes for rows that blocks of 256 do not divide (src/llama-quant.cpp, August 2026).
FALLBACKS = {"q6_k": "q8_0", "q5_k": "q5_1", "q4_k": "q5_0", "q3_k": "q4_0", "q2_k": "q4_0"}


def stored_as(kind: str, row: int) -> str:
    """The type in which rows of so many weights are stored: the one asked for if its blocks divide them."""
    if row % BLOCKS[kind][0] == 0:
        return kind
    return stored_as(FALLBACKS[kind], row) if kind in FALLBACKS else "f16"


def matrix_bytes(kind: str, rows: int, row: int) -> int:
    """Of a matrix with so many rows of so many weights."""
    weights, size = BLOCKS[stored_as(kind, row)]
    return rows * row // weights * size


def ffn_bytes(dense: DenseModel, kind: str, neurons: int, copies: int = 1) -> int:
    """Of `copies` FFNs of so many neurons each; without biases, which are not worth counting."""
    hidden, readers = dense.hidden_size, 1 + (dense.ffn_shapes.gate_FD is not None)
    return copies * (readers * matrix_bytes(kind, neurons, hidden) + matrix_bytes(kind, hidden, neurons))


def weights_of(dense: DenseModel, layout: Layout | None, kind: GGUFType, context: int) -> Weights:
    """What the model weighs as GGUF.

    Args:
        dense: the model; only its shapes are read.
        layout: how its FFNs are cut, every layer alike; None leaves them whole.
        kind: type of the matrices. Norms, biases and routers stay in float32.
        context: tokens in the cache of keys and values, which is kept in float16.
    """
    layers, hidden = dense.num_layers, dense.hidden_size
    ffns = {name for layer in range(layers) for name in dense.ffn_names(layer)}
    blocks = tuple(f"{dense.blocks.block(layer)}." for layer in range(layers))
    inside = sum(_tensor_bytes(kind, s) for n, s in dense.shapes.items() if n.startswith(blocks) and n not in ffns)
    outside = {n: s for n, s in dense.shapes.items() if not n.startswith(blocks) and n != dense.embedding}
    # llama-quantize stores the head in q6_k if the other matrices get a smaller type of 256 weights a block.
    head_kind = "q6_k" if kind in FALLBACKS else kind
    table = _tensor_bytes(head_kind, dense.shapes[dense.embedding])
    head = sum(_tensor_bytes(head_kind, shape) for shape in outside.values()) + (table if dense.tied else 0)
    fixed, movable, read = _cut(dense, layout, kind)
    return Weights(
        num_layers=layers,
        fixed_bytes=inside // layers + fixed,
        cache_bytes=_cache_bytes(dense, context) // layers,
        movable_bytes=movable,
        movable_read_bytes=read,
        head_bytes=head,
        embedding_bytes=table,
        tied=bool(dense.tied),
        # 104 MiB of an 8-layer llama of 2048 x 8192 with 49,152 tokens, as llama.cpp says itself.
        buffer_bytes=4 * BATCH_TOKENS * (int(dense.text_config.vocab_size) + 2 * hidden),
    )


def _cut(dense: DenseModel, layout: Layout | None, kind: str) -> tuple[int, int, int]:
    """Of one layer's FFN: bytes of router and shared experts, of what can be moved, and what a token reads of that."""
    if layout is None:
        whole = ffn_bytes(dense, kind, dense.num_neurons)
        return 0, whole, whole
    width = layout.expert_width(dense.num_neurons)
    if layout.is_static:
        smaller = ffn_bytes(dense, kind, layout.num_active * width)
        return 0, smaller, smaller
    router = matrix_bytes("f32", layout.num_routed, dense.hidden_size)
    shared = ffn_bytes(dense, kind, layout.num_shared * width)
    routed, active = (ffn_bytes(dense, kind, width, n) for n in (layout.num_routed, layout.num_routed_active))
    return router + shared, routed, active


def _tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return matrix_bytes(kind if len(shape) > 1 else "f32", math.prod(shape[:-1]), shape[-1])


def _cache_bytes(dense: DenseModel, context: int) -> int:
    """Keys and values of all layers; a layer with a sliding window keeps no more than that."""
    heads = int(getattr(dense.text_config, "num_key_value_heads", None) or dense.text_config.num_attention_heads)
    window, slides = dense.attention.sliding_window, dense.attention.sliding_layers
    tokens = [min(context, window) if window and slides[i] else context for i in range(dense.num_layers)]
    return 2 * 2 * heads * dense.attention.head_dim * sum(tokens)
