"""The way back: what reaches the pre-activations, the weights, and the router's weights.

Kept from the way there are only the inputs and the pre-activations; the activations are computed again.

Shapes: see the package.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.activation import activate_with_slope
from moeify.kernels.launch import COMPILED, Launch
from moeify.kernels.routing import Routing
from moeify.kernels.tiles import tile_of

# Elements of a program of the activation's way back; of its columns at most this many.
ELEMENTS = 2048
MAX_COLUMNS = 1024
# Rows and columns that the sum of a bias's gradient reads at a time.
BIAS_BLOCK = (32, 64)


@dataclass(frozen=True)
class ActivationGrad:
    """What comes out of the activation's way back.

    Args:
        pre_SP: gradient of the pre-activations, in sorted order.
        hidden_SF: what went into the second projection, times the router's weight, in sorted order: with the gradient
            of the output it makes that of the second projection.
        gates_S: gradient of the router's weights in the order of the slots, float32.
    """

    pre_SP: Tensor
    hidden_SF: Tensor
    gates_S: Tensor


def activation_grad(
    grad_SF: Tensor, pre_SP: Tensor, gates_S: Tensor, routing: Routing, *, activation: str
) -> ActivationGrad:
    """From the gradient of the second projection's inputs to that of the pre-activations.

    Args:
        grad_SF: gradient of the output times the second projection, in sorted order, not yet times the router's weight.
        pre_SP: pre-activations that `up` kept; P of 2 * F means that they are gated.
        gates_S: the router's weights.
        routing: sorted as it was on the way there.
        activation: a name of reference.ACTIVATIONS.
    """
    num_slots, width = grad_SF.shape
    found = ActivationGrad(
        torch.empty_like(pre_SP),
        torch.empty_like(grad_SF),
        # Slots that no expert takes stay 0.
        torch.zeros(num_slots, dtype=torch.float32, device=grad_SF.device),
    )
    cols = min(triton.next_power_of_2(width), MAX_COLUMNS)
    rows = max(ELEMENTS // cols, 1)
    activation_grad_kernel[(triton.cdiv(num_slots, rows),)](
        grad_SF,
        pre_SP,
        gates_S,
        routing.order_S,
        routing.offsets,
        found.pre_SP,
        found.hidden_SF,
        found.gates_S,
        NUM_EXPERTS=len(routing.offsets) - 1,
        F=width,
        GATED=pre_SP.shape[1] == 2 * width,
        ACTIVATION=activation,
        ROWS=rows,
        COLS=cols,
        **COMPILED,
    )
    return found


def weight_grad(
    left_SM: Tensor,
    right_SN: Tensor,
    routing: Routing,
    num_experts: int,
    launch: Launch,
    *,
    left_by_token: bool,
    right_by_token: bool,
    num_ranks: int,
) -> Tensor:
    """Each expert's left' @ right over its rows.

    Args:
        left_SM, right_SN: rows in sorted order, or (T, ...) where they belong to tokens.
        routing: the order of the rows.
        num_experts: E.
        launch: rows and columns of the result's tiles, and how many slots are read at a time (inner).
        left_by_token, right_by_token: which of them are rows of tokens.
        num_ranks: K.

    Returns:
        (E, M, N) in the dtype of left_SM; zeros for experts without rows.
    """
    num_rows, num_cols = left_SM.shape[1], right_SN.shape[1]
    rows, cols = max(min(launch.rows, triton.next_power_of_2(num_rows)), 16), launch.cols_for(num_cols)
    out = left_SM.new_empty(num_experts, num_rows, num_cols)
    weight_grad_kernel[(num_experts * triton.cdiv(num_rows, rows) * triton.cdiv(num_cols, cols),)](
        left_SM,
        right_SN,
        routing.order_S,
        routing.offsets,
        out,
        K=num_ranks,
        M=num_rows,
        N=num_cols,
        LEFT_BY_TOKEN=left_by_token,
        RIGHT_BY_TOKEN=right_by_token,
        COLS=cols,
        **{**launch.options(left_SM.dtype), "ROWS": rows},
    )
    return out


def bias_grad(grad_SN: Tensor, routing: Routing, num_experts: int) -> Tensor:
    """(E, N): the sum over each expert's rows, in sorted order; zeros for experts without rows."""
    num_cols = grad_SN.shape[1]
    rows, cols = BIAS_BLOCK
    out_EN = grad_SN.new_empty(num_experts, num_cols)
    bias_grad_kernel[(num_experts, triton.cdiv(num_cols, cols))](
        grad_SN, routing.offsets, out_EN, N=num_cols, ROWS=rows, COLS=cols, **COMPILED
    )
    return out_EN


@triton.jit
def bias_grad_kernel(grad, offsets, out, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(tl.load(offsets + expert), end, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (col < N)[None, :]
        acc += tl.load(grad + row.to(tl.int64)[:, None] * N + col[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + expert * N + col, tl.sum(acc, 0).to(out.dtype.element_ty), mask=col < N)


@triton.jit
def activation_grad_kernel(
    grad,
    pre,
    gates,
    order,
    offsets,
    pre_grad,
    hidden,
    gates_grad,
    NUM_EXPERTS: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    P: tl.constexpr = 2 * F if GATED else F
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    routed = row < tl.load(offsets + NUM_EXPERTS)
    slot = tl.load(order + row, mask=routed, other=0)
    gate = tl.load(gates + slot, mask=routed, other=0.0).to(tl.float32)[:, None]
    at = row.to(tl.int64)[:, None]
    gate_grad = tl.zeros((ROWS,), tl.float32)
    for first in range(0, F, COLS):
        col = first + tl.arange(0, COLS)[None, :]
        there = routed[:, None] & (col < F)
        flow = tl.load(grad + at * F + col, mask=there, other=0.0).to(tl.float32)
        up = tl.load(pre + at * P + (P - F) + col, mask=there, other=0.0).to(tl.float32)
        if GATED:
            gated = tl.load(pre + at * P + col, mask=there, other=0.0).to(tl.float32)
            value, slope = activate_with_slope(gated, ACTIVATION)
            product = value * up
            tl.store(pre_grad + at * P + col, (flow * gate * up * slope).to(pre_grad.dtype.element_ty), mask=there)
            up_grad = flow * gate * value
        else:
            product, slope = activate_with_slope(up, ACTIVATION)
            up_grad = flow * gate * slope
        tl.store(pre_grad + at * P + (P - F) + col, up_grad.to(pre_grad.dtype.element_ty), mask=there)
        tl.store(hidden + at * F + col, (product * gate).to(hidden.dtype.element_ty), mask=there)
        gate_grad += tl.sum(flow * product, 1)
    tl.store(gates_grad + slot, gate_grad, mask=routed)


@triton.jit
def weight_grad_kernel(
    left,
    right,
    order,
    offsets,
    out,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    RIGHT_BY_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    ROW_TILES: tl.constexpr = (M + ROWS - 1) // ROWS
    COLUMN_TILES: tl.constexpr = (N + COLS - 1) // COLS
    program = tl.program_id(0)
    expert = (program // (ROW_TILES * COLUMN_TILES)).to(tl.int64)
    tile, column_tile = tile_of(program % (ROW_TILES * COLUMN_TILES), ROW_TILES, COLUMN_TILES, GROUP)
    end = tl.load(offsets + expert + 1)
    row = tile * ROWS + tl.arange(0, ROWS)
    col = column_tile * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(tl.load(offsets + expert), end, INNER):
        member = first + tl.arange(0, INNER)
        token = tl.load(order + member, mask=member < end, other=0).to(tl.int64) // K
        left_row = token if LEFT_BY_TOKEN else member.to(tl.int64)
        right_row = token if RIGHT_BY_TOKEN else member.to(tl.int64)
        # Past the end stand other experts' rows, or nothing that was ever written: both sides are masked.
        left_there = (member < end)[None, :] & (row < M)[:, None]
        right_there = (member < end)[:, None] & (col < N)[None, :]
        block = tl.load(left + left_row[None, :] * M + row[:, None], mask=left_there, other=0.0)
        other = tl.load(right + right_row[:, None] * N + col[None, :], mask=right_there, other=0.0)
        acc = tl.dot(block, other, acc, input_precision=PRECISION)
    out_at = out + expert * (M * N) + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=(row < M)[:, None] & (col < N)[None, :])
