"""Few tokens, no gradient: every expert that a token asks for streams its weights once past all tokens.

Nothing is sorted, gathered or scattered. Tokens that did not ask for an expert are computed along with the others and
then masked out, which is free as long as reading the weights takes longer.

Shapes: see the package.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.activation import activate
from moeify.kernels.combine import combine
from moeify.kernels.launch import COMPILED, key_of, launch_for, precision
from moeify.kernels.routing import count_ids
from moeify.kernels.tiles import load_block

# Fewer programs than this leave an H200 (132 multiprocessors) idle: then the inner dimension is split as well.
PROGRAMS = 128
MAX_SPLIT = 8


def decode(
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    bias_EP: Tensor | None,
    *,
    activation: str,
    gated: bool,
) -> Tensor:
    """The whole feed-forward for 2 to launch.DECODE_TOKENS tokens; arguments as in ops.moe_ffn."""
    num_tokens, dim = inputs_TD.shape
    num_experts, _, width = down_EDF.shape
    dtype, device = inputs_TD.dtype, inputs_TD.device
    padded = max(triton.next_power_of_2(num_tokens), 16)
    up, down = (launch_for(key_of(f"decode_{half}", padded, width), dtype, device) for half in ("up", "down"))
    slots = min(num_experts, experts_TK.numel())
    hits, num_hits = list_hits(experts_TK, num_experts)
    hidden = inputs_TD.new_empty(slots, padded, width)
    shared: dict[str, Any] = {
        "D": dim,
        "F": width,
        "NUM_EXPERTS": num_experts,
        "PRECISION": precision(dtype),
        "ROWS": padded,
        **COMPILED,
    }
    up_cols = up.cols_for(width)
    decode_up_kernel[(slots, triton.cdiv(width, up_cols))](
        inputs_TD,
        up_EPD,
        hidden if bias_EP is None else bias_EP,
        experts_TK,
        weights_TK,
        hits,
        num_hits,
        hidden,
        num_tokens,
        dim,
        K=experts_TK.shape[1],
        RANKS=triton.next_power_of_2(experts_TK.shape[1]),
        GATED=gated,
        ACTIVATION=activation,
        BIASED=bias_EP is not None,
        COLS=up_cols,
        INNER=up.inner,
        num_warps=up.warps,
        num_stages=up.stages,
        **shared,
    )
    down_cols = down.cols_for(dim)
    column_tiles = triton.cdiv(dim, down_cols)
    split = min(max(PROGRAMS // column_tiles, 1), MAX_SPLIT)
    parts = inputs_TD.new_empty(num_tokens, split, dim, dtype=dtype if split == 1 else torch.float32)
    decode_down_kernel[(column_tiles, split)](
        hidden,
        down_EDF,
        hits,
        num_hits,
        parts,
        num_tokens,
        SPLIT=split,
        SLOTS=slots,
        COLS=down_cols,
        INNER=down.inner,
        num_warps=down.warps,
        num_stages=down.stages,
        **shared,
    )
    return parts.squeeze(1) if split == 1 else combine(parts, None, 0, dtype)


def list_hits(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The experts that any token asks for, in rising order, and how many these are; int32, on the device."""
    hits = torch.empty(num_experts, dtype=torch.int32, device=experts_TK.device)
    num_hits = torch.empty(1, dtype=torch.int32, device=experts_TK.device)
    list_kernel[(1,)](
        experts_TK,
        hits,
        num_hits,
        experts_TK.numel(),
        NUM_EXPERTS=num_experts,
        WIDTH=max(triton.next_power_of_2(num_experts), 2),
        CHUNK=1024,
        **COMPILED,
    )
    return hits, num_hits


@triton.jit
def list_kernel(
    experts,
    hits,
    num_hits,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.arange(0, WIDTH)
    count = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, num_slots, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        count += count_ids(experts, slot, slot < num_slots, NUM_EXPERTS, WIDTH)
    hit = (count > 0).to(tl.int32)
    tl.store(hits + tl.cumsum(hit, 0) - hit, expert, mask=hit > 0)
    tl.store(num_hits, tl.sum(hit, 0))


@triton.jit
def decode_up_kernel(
    inputs,
    weights,
    bias,
    experts,
    gates,
    hits,
    num_hits,
    hidden,
    num_tokens,
    loop_size,
    K: tl.constexpr,
    RANKS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """hidden (SLOTS, ROWS, F): each listed expert's, times the router's weight; 0 for tokens that did not ask."""
    P: tl.constexpr = 2 * F if GATED else F
    EVEN: tl.constexpr = D % INNER == 0
    slot = tl.program_id(0)
    if slot >= tl.load(num_hits):
        return
    expert = tl.load(hits + slot).to(tl.int64)
    token = tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, INNER)
    # Rows without a token are left out and not read in vain: sixteen rows for one token would be half of the traffic.
    there = token < num_tokens
    x_at = inputs + token[:, None] * D + inner[None, :]
    gate_at = weights + expert * (P * D) + tl.minimum(col, F - 1)[None, :] * D + inner[:, None]
    gate_acc = tl.zeros((ROWS, COLS), tl.float32)
    up_acc = tl.zeros((ROWS, COLS), tl.float32)
    tl.assume(loop_size > 0)
    for k in range(0, loop_size, INNER):
        x = tl.load(x_at, mask=there[:, None] & (k + inner[None, :] < D), other=0.0)
        inside = k + inner[:, None] < D
        up_acc = tl.dot(x, load_block(gate_at + (P - F) * D, inside, EVEN), up_acc, input_precision=PRECISION)
        if GATED:
            gate_acc = tl.dot(x, load_block(gate_at, inside, EVEN), gate_acc, input_precision=PRECISION)
        x_at += INNER
        gate_at += INNER
    if BIASED:
        bias_at = bias + expert * P + tl.minimum(col, F - 1)
        up_acc += tl.load(bias_at + (P - F)).to(tl.float32)[None, :]
        if GATED:
            gate_acc += tl.load(bias_at).to(tl.float32)[None, :]
    if GATED:
        value = activate(gate_acc, ACTIVATION) * up_acc
    else:
        value = activate(up_acc, ACTIVATION)
    rank = tl.arange(0, RANKS)
    asked = there[:, None] & (rank < K)[None, :]
    asked_at = token[:, None] * K + rank[None, :]
    chosen = tl.load(experts + asked_at, mask=asked, other=NUM_EXPERTS)
    mine = chosen == expert
    gate = tl.sum(tl.where(mine, tl.load(gates + asked_at, mask=asked, other=0.0).to(tl.float32), 0.0), 1)
    value = tl.where(tl.max(mine.to(tl.int32), 1)[:, None] > 0, value * gate[:, None], 0.0)
    hidden_at = hidden + slot.to(tl.int64) * (ROWS * F) + token[:, None] * F + col[None, :]
    tl.store(hidden_at, value.to(hidden.dtype.element_ty), mask=there[:, None] & (col < F)[None, :])


@triton.jit
def decode_down_kernel(
    hidden,
    weights,
    hits,
    num_hits,
    parts,
    num_tokens,
    SPLIT: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """parts (T, SPLIT, D): the sum over a share of the listed experts' neurons."""
    STEPS: tl.constexpr = (F + INNER - 1) // INNER
    EVEN: tl.constexpr = F % INNER == 0
    listed = tl.load(num_hits)
    part = tl.program_id(1)
    total = listed * STEPS
    share = (total + SPLIT - 1) // SPLIT
    first = part * share
    token = tl.arange(0, ROWS)
    there = token < num_tokens
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    weight_col = tl.minimum(col, D - 1)[None, :] * F
    inner = tl.arange(0, INNER)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    # One loop over experts and neurons. The expert's id is read a step ahead: read inside the step, it would keep the
    # compiler from having several blocks of weights in flight.
    expert = tl.load(hits + tl.minimum(first // STEPS, SLOTS - 1), mask=first < total, other=0).to(tl.int64)
    for step in range(first, tl.minimum(first + share, total)):
        slot = step // STEPS
        neuron = step % STEPS * INNER + inner
        row_at = hidden + slot.to(tl.int64) * (ROWS * F) + token[:, None] * F + neuron[None, :]
        weight_at = weights + expert * (D * F) + weight_col + neuron[:, None]
        block = tl.load(row_at, mask=there[:, None] & (neuron[None, :] < F), other=0.0)
        weight = load_block(weight_at, neuron[:, None] < F, EVEN)
        acc = tl.dot(block, weight, acc, input_precision=PRECISION)
        expert = tl.load(hits + tl.minimum((step + 1) // STEPS, listed - 1)).to(tl.int64)
    out_at = parts + (token[:, None] * SPLIT + part) * D + col[None, :]
    tl.store(out_at, acc.to(parts.dtype.element_ty), mask=there[:, None] & (col < D)[None, :])
