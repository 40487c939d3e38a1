"""Sizes, and what a split will cost before it is begun."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moeify.calibration.activations import KEEP_BYTES, sample_size
from moeify.export.writer import SHARD_BYTES, MoEWriter
from moeify.models.dense import DenseModel
from moeify.resources import available_memory

if TYPE_CHECKING:
    from moeify.convert.prepare import Prepared

# Split time over the time of one dense forward pass over the calibration tokens.
TIME_FACTOR = 4.0
# Time of a token that the model writes itself over that of one it reads.
OWN_TEXT_FACTOR = 5.0
# Of the memory that is free, for arrays as long as the text; a layer, its activations and grams take their part.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Estimate:
    """What a split will take on this machine; the matmul rate is measured, the rest is arithmetic."""

    duration_s: float
    peak_memory_bytes: int
    checkpoint_bytes: int
    matmul_flops_per_second: float


def count_parameters(writer: MoEWriter) -> tuple[int, int]:
    """Parameters of the written checkpoint, and those a token is multiplied with (embedding look-up left out)."""
    shapes = writer.shapes()
    total = sum(tensor.numel() for tensor in shapes.values())
    layout, dense = writer.layout, writer.dense
    # Neurons of all layers that are there, and that a token does not use.
    layers = [layout.of_layer(layer) for layer in range(dense.num_layers)]
    idle = sum(
        (own.num_experts - own.num_active) * own.expert_width(dense.num_neurons) for own in layers if not own.is_static
    )
    neuron = dense.ffn_shapes.neurons(slice(1)).tensors()
    unused = idle * sum(tensor.numel() for name, tensor in neuron.items() if name != "down_bias_D")
    # A tied embedding is the head's matrix too; an untied one is only looked up, and patches of images are computed.
    is_table = dense.family.modality == "text" and (writer.target.untie or not dense.tied)
    looked_up = shapes[dense.embedding].numel() if is_table else 0
    return total, total - unused - looked_up


def estimate(prepared: "Prepared") -> Estimate:
    """Time, memory and size of a prepared split."""
    dense, writer = prepared.dense, prepared.writer
    tokens = prepared.options.tokens if prepared.needs_text else 0
    texts = prepared.options.calibration
    # A model of sound is split on what its user names, which may not be known yet.
    own = tokens * texts.count("self") // max(1, len(texts))
    neurons = dense.num_neurons
    rate = matmul_rate(prepared.options.device)
    largest_layer = 4 * sum(
        torch.Size(shape).numel()
        for name, shape in dense.shapes.items()
        if name.startswith(f"{dense.blocks.block(0)}.")
    )
    active = (
        neurons * prepared.layout.num_active // prepared.layout.num_experts if prepared.layout.is_static else neurons
    )
    # Three moment matrices, one damped copy and its Cholesky factor; of few tokens the system is as small as they are.
    primal, dual = 5 * 4 * active * active, 4 * tokens * (3 * tokens + active)
    grams = (dual if tokens < active else primal) if prepared.options.refit else 0
    activations = min(4 * tokens * neurons, KEEP_BYTES)
    if place_of_text(prepared, streams := text_bytes(prepared)) == "disk":
        # What is computed again for every pass need not be kept, and what lies on the disk need not stay in memory.
        activations, streams = 0, 0
    # Contributions of the sample, their squares, and a copy while they are taken.
    sample = 3 * 4 * min(tokens, sample_size(neurons)) * neurons
    written = sum(t.numel() * t.element_size() for t in writer.shapes().values())
    writing = 2 * min(SHARD_BYTES, written) + 2 * largest_layer
    # The stock model, which writes.
    whole = dense.num_parameters * dense.dtype.itemsize if own else 0
    return Estimate(
        duration_s=(TIME_FACTOR * forward_flops(dense, tokens) + OWN_TEXT_FACTOR * forward_flops(dense, own)) / rate,
        peak_memory_bytes=process_bytes()
        + max(2 * largest_layer + max(grams, sample) + 2 * activations + streams, writing, whole),
        checkpoint_bytes=written,
        matmul_flops_per_second=rate,
    )


def text_bytes(prepared: "Prepared") -> int:
    """Of all arrays as long as the calibration text, in float32, where they are most."""
    options, layout = prepared.options, prepared.layout
    # The hidden states, what the FFN sees and what it gives; beside it the stream that a refit returns to.
    wide = 6 if options.refit_to == "stream" else 3
    # Norms, scores and weights of routed experts.
    narrow = 0 if layout.is_static else 3 * layout.num_routed
    return 4 * (options.tokens if prepared.needs_text else 0) * (wide * prepared.dense.hidden_size + narrow)


def place_of_text(prepared: "Prepared", num_bytes: int) -> str:
    """`memory` or `disk`: where arrays of so many bytes are held, unless the options say."""
    if prepared.options.hidden_states != "auto":
        return prepared.options.hidden_states
    return "disk" if num_bytes > MEMORY_SHARE * available_memory() else "memory"


def forward_flops(dense: DenseModel, tokens: int) -> float:
    """Multiply-adds, counted twice, of one dense forward pass; attention scores are left out."""
    is_table = dense.family.modality == "text" and not dense.tied
    weights = dense.num_parameters - (torch.Size(dense.shapes[dense.embedding]).numel() if is_table else 0)
    return 2.0 * weights * tokens


def matmul_rate(device: str, size: int = 1024, repeats: int = 5) -> float:
    matrix = torch.ones(size, size, device=device)
    (matrix @ matrix).sum().item()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def process_bytes() -> int:
    """Memory that this process has, with the libraries that it loaded."""
    import psutil

    return int(psutil.Process().memory_info().rss)
