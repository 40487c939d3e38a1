"""The first half of the experts: gather the tokens, one or two matrix products, activation.

Shapes: see the package.
"""

import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.activation import activate
from moeify.kernels.launch import Launch, weights_argument
from moeify.kernels.routing import Routing
from moeify.kernels.tiles import load_block, load_transposed, rows_of, tile_of


def up(
    inputs_TD: Tensor,
    up_EPD: Tensor,
    routing: Routing,
    launch: Launch,
    *,
    activation: str,
    gated: bool,
    bias_EP: Tensor | None = None,
    pre_SP: Tensor | None = None,
) -> Tensor:
    """act(gate) * up of every routed slot, in sorted order.

    Args:
        inputs_TD, up_EPD: of one dtype, contiguous.
        routing: where the slots go.
        launch: the tiles; its rows are the routing's.
        activation: a name of reference.ACTIVATIONS.
        gated: whether the first half of up_EPD gates the second.
        bias_EP: added before the activation, if it is there; contiguous.
        pre_SP: filled with what comes before the activation, for the backward pass.

    Returns:
        hidden_SF, rows in sorted order.
    """
    num_slots, dim = len(routing.order_S), inputs_TD.shape[1]
    width = up_EPD.shape[1] // (2 if gated else 1)
    hidden_SF = inputs_TD.new_empty(num_slots, width)
    cols = launch.cols_for(width)
    weights, tma = weights_argument(up_EPD, (cols, launch.inner), bulk=launch.tma)
    up_kernel[(launch.row_programs(routing.max_tiles) * triton.cdiv(width, cols),)](
        inputs_TD,
        weights,
        routing.order_S,
        routing.offsets,
        routing.tile_expert,
        routing.tile_row,
        routing.num_tiles,
        hidden_SF if bias_EP is None else bias_EP,
        hidden_SF if pre_SP is None else pre_SP,
        hidden_SF,
        dim,
        K=num_slots // len(inputs_TD),
        D=dim,
        F=width,
        GATED=gated,
        ACTIVATION=activation,
        BIASED=bias_EP is not None,
        SAVE_PRE=pre_SP is not None,
        COLS=cols,
        TMA=tma,
        **launch.options(inputs_TD.dtype),
    )
    return hidden_SF


@triton.jit
def up_kernel(
    inputs,
    weights,
    order,
    offsets,
    tile_expert,
    tile_row,
    num_tiles,
    bias,
    pre,
    hidden,
    loop_size,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIASED: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    P: tl.constexpr = 2 * F if GATED else F
    COLUMN_TILES: tl.constexpr = (F + COLS - 1) // COLS
    EVEN: tl.constexpr = D % INNER == 0
    tiles = tl.load(num_tiles)
    tile, column_tile = tile_of(tl.program_id(0), tiles, COLUMN_TILES, GROUP)
    if (tile >= tiles) | (column_tile >= COLUMN_TILES):
        return
    expert, first, num_rows = rows_of(tile, offsets, tile_expert, tile_row, ROWS)
    row = tl.arange(0, ROWS)
    token = tl.load(order + first + row, mask=row < num_rows, other=0).to(tl.int64) // K
    col = column_tile * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, INNER)
    x_at = inputs + token[:, None] * D + inner[None, :]
    # Two accumulators, never two products into one: that is miscompiled on some devices.
    gate_acc = tl.zeros((ROWS, COLS), tl.float32)
    up_acc = tl.zeros((ROWS, COLS), tl.float32)
    weight_row = (expert * P + column_tile * COLS).to(tl.int32)
    if TMA:
        gate_at = 0
    else:
        gate_at = weights + expert * (P * D) + tl.minimum(col, F - 1)[None, :] * D + inner[:, None]
    tl.assume(loop_size > 0)
    for k in range(0, loop_size, INNER):
        x = load_block(x_at, k + inner[None, :] < D, EVEN)
        there = k + inner[:, None] < D
        up_block = load_transposed(weights, weight_row + (P - F), k, gate_at + (P - F) * D, there, EVEN, TMA)
        up_acc = tl.dot(x, up_block, up_acc, input_precision=PRECISION)
        if GATED:
            gate_block = load_transposed(weights, weight_row, k, gate_at, there, EVEN, TMA)
            gate_acc = tl.dot(x, gate_block, gate_acc, input_precision=PRECISION)
        x_at += INNER
        gate_at += INNER
    if BIASED:
        bias_at = bias + expert * P + tl.minimum(col, F - 1)
        up_acc += tl.load(bias_at + (P - F)).to(tl.float32)[None, :]
        if GATED:
            gate_acc += tl.load(bias_at).to(tl.float32)[None, :]
    there = (row < num_rows)[:, None] & (col < F)[None, :]
    if SAVE_PRE:
        pre_at = pre + first * P + row[:, None] * P + col[None, :]
        tl.store(pre_at + (P - F), up_acc.to(pre.dtype.element_ty), mask=there)
        if GATED:
            tl.store(pre_at, gate_acc.to(pre.dtype.element_ty), mask=there)
    if GATED:
        value = activate(gate_acc, ACTIVATION) * up_acc
    else:
        value = activate(up_acc, ACTIVATION)
    hidden_at = hidden + first * F + row[:, None] * F + col[None, :]
    tl.store(hidden_at, value.to(hidden.dtype.element_ty), mask=there)
