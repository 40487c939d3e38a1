"""One token, no gradient: products of matrices with a vector.

Each program owns a few outputs and reads their weights once, in whole rows; no matrix unit, no list of experts. Nothing
is computed twice, so all that counts is how many bytes are on their way at a time.

Shapes: see the package.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.activation import activate
from moeify.kernels.launch import COMPILED, key_of, launch_for
from moeify.kernels.tiles import load_block


def single(
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
    """The whole feed-forward for T = 1; arguments as in ops.moe_ffn."""
    dim, num_ranks = inputs_TD.shape[1], experts_TK.shape[1]
    num_experts, _, width = down_EDF.shape
    dtype, device = inputs_TD.dtype, inputs_TD.device
    up, down = (launch_for(key_of(f"single_{half}", 1, width), dtype, device) for half in ("up", "down"))
    hidden_KF = inputs_TD.new_empty(num_ranks, width)
    out_TD = inputs_TD.new_empty(1, dim)
    sizes: dict[str, Any] = {"D": dim, "F": width, "NUM_EXPERTS": num_experts, **COMPILED}
    single_up_kernel[(num_ranks, triton.cdiv(width, up.cols))](
        inputs_TD,
        up_EPD,
        hidden_KF if bias_EP is None else bias_EP,
        experts_TK,
        weights_TK,
        hidden_KF,
        dim,
        GATED=gated,
        ACTIVATION=activation,
        BIASED=bias_EP is not None,
        COLS=up.cols,
        INNER=min(up.inner, triton.next_power_of_2(dim)),
        num_warps=up.warps,
        num_stages=up.stages,
        **sizes,
    )
    single_down_kernel[(triton.cdiv(dim, down.cols),)](
        hidden_KF,
        down_EDF,
        experts_TK,
        out_TD,
        num_ranks,
        K=num_ranks,
        RANKS=min(down.rows, triton.next_power_of_2(num_ranks)),
        COLS=down.cols,
        INNER=min(down.inner, triton.next_power_of_2(width)),
        num_warps=down.warps,
        num_stages=down.stages,
        **sizes,
    )
    return out_TD


@triton.jit
def single_up_kernel(
    inputs,
    weights,
    bias,
    experts,
    gates,
    hidden,
    loop_size,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """hidden (K, F): each chosen expert's, times the router's weight; 0 for an id that names no expert."""
    P: tl.constexpr = 2 * F if GATED else F
    EVEN: tl.constexpr = D % INNER == 0
    rank = tl.program_id(0)
    chosen = tl.load(experts + rank)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, INNER)
    expert = tl.minimum(chosen, NUM_EXPERTS - 1)
    gate_at = weights + expert * (P * D) + tl.minimum(col, F - 1)[:, None] * D + inner[None, :]
    x_at = inputs + inner
    gate_acc = tl.zeros((COLS, INNER), tl.float32)
    up_acc = tl.zeros((COLS, INNER), tl.float32)
    tl.assume(loop_size > 0)
    for k in range(0, loop_size, INNER):
        there = k + inner < D
        up_block = load_block(gate_at + (P - F) * D, there[None, :], EVEN)
        if GATED:
            gate_block = load_block(gate_at, there[None, :], EVEN)
        x = load_block(x_at, there, EVEN).to(tl.float32)[None, :]
        up_acc += up_block.to(tl.float32) * x
        if GATED:
            gate_acc += gate_block.to(tl.float32) * x
        x_at += INNER
        gate_at += INNER
    up = tl.sum(up_acc, 1)
    gate = tl.sum(gate_acc, 1)
    if BIASED:
        bias_at = bias + expert * P + tl.minimum(col, F - 1)
        up += tl.load(bias_at + (P - F)).to(tl.float32)
        if GATED:
            gate += tl.load(bias_at).to(tl.float32)
    if GATED:
        value = activate(gate, ACTIVATION) * up
    else:
        value = activate(up, ACTIVATION)
    value = tl.where(chosen < NUM_EXPERTS, value * tl.load(gates + rank).to(tl.float32), 0.0)
    tl.store(hidden + rank * F + col, value.to(hidden.dtype.element_ty), mask=col < F)


@triton.jit
def single_down_kernel(
    hidden,
    weights,
    experts,
    out,
    loop_size,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out (D): the sum over the chosen experts; RANKS of them at a time."""
    EVEN: tl.constexpr = F % INNER == 0 and K % RANKS == 0
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, INNER)
    weight_at = tl.minimum(col, D - 1)[None, :, None] * F + inner[None, None, :]
    acc = tl.zeros((RANKS, COLS, INNER), tl.float32)
    tl.assume(loop_size > 0)
    for first in range(0, loop_size, RANKS):
        rank = first + tl.arange(0, RANKS)
        known = tl.minimum(rank, K - 1)
        # An id that names no expert has zeros for hidden values; any weights will do.
        expert = tl.minimum(tl.load(experts + known), NUM_EXPERTS - 1)
        expert_at = weights + expert[:, None, None] * (D * F) + weight_at
        hidden_at = hidden + known[:, None] * F + inner[None, :]
        for neuron in range(0, F, INNER):
            there = (rank < K)[:, None] & (neuron + inner < F)[None, :]
            weight = load_block(expert_at + neuron, there[:, None, :], EVEN)
            value = load_block(hidden_at + neuron, there, EVEN).to(tl.float32)
            acc += weight.to(tl.float32) * value[:, None, :]
    total = tl.sum(tl.sum(acc, 2), 0)
    tl.store(out + col, total.to(out.dtype.element_ty), mask=col < D)
