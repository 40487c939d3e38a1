"""One matrix product for each expert's rows: the second half of the experts, and what flows back through both halves.

Shapes: see the package; N output columns, C contracted size.
"""

import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.launch import Launch, weights_argument
from moeify.kernels.routing import Routing
from moeify.kernels.tiles import load_block, load_transposed, rows_of, tile_of


def expert_matmul(
    rows: Tensor,
    weights: Tensor,
    routing: Routing,
    launch: Launch,
    *,
    transposed: bool,
    from_tokens: bool = False,
    to_slots: bool = False,
    scale_S: Tensor | None = None,
) -> Tensor:
    """Each sorted row times its expert's matrix.

    Args:
        rows: (S, C) in sorted order, or (T, C) if they come from tokens; contiguous.
        weights: (E, N, C), or (E, C, N) if not transposed; of the same dtype, contiguous.
        routing: the order of the rows.
        launch: the tiles; its rows are the routing's.
        transposed: whether the inner size is the last dimension of weights, as in torch's linear.
        from_tokens: whether each row is gathered from its token.
        to_slots: whether the result is put back where the slots are; else it stays in sorted order.
        scale_S: what each slot's result is multiplied with; any floating dtype.

    Returns:
        (S, N); slots that no expert takes hold nothing.
    """
    num_slots, inner = len(routing.order_S), rows.shape[1]
    num_cols = weights.shape[1] if transposed else weights.shape[2]
    out_SN = rows.new_empty(num_slots, num_cols)
    cols = launch.cols_for(num_cols)
    # The bulk copy takes a block across an expert's border; along the inner size that would add the next expert's rows.
    bulk = launch.tma and (transposed or inner % launch.inner == 0)
    block = (cols, launch.inner) if transposed else (launch.inner, cols)
    argument, tma = weights_argument(weights, block, bulk=bulk)
    expert_matmul_kernel[(launch.row_programs(routing.max_tiles) * triton.cdiv(num_cols, cols),)](
        rows,
        argument,
        routing.order_S,
        routing.offsets,
        routing.tile_expert,
        routing.tile_row,
        routing.num_tiles,
        out_SN if scale_S is None else scale_S,
        out_SN,
        inner,
        K=num_slots // len(rows) if from_tokens else 1,
        N=num_cols,
        C=inner,
        TRANSPOSED=transposed,
        FROM_TOKENS=from_tokens,
        TO_SLOTS=to_slots,
        SCALE=scale_S is not None,
        COLS=cols,
        TMA=tma,
        **launch.options(rows.dtype),
    )
    return out_SN


@triton.jit
def expert_matmul_kernel(
    rows,
    weights,
    order,
    offsets,
    tile_expert,
    tile_row,
    num_tiles,
    scale,
    out,
    loop_size,
    K: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FROM_TOKENS: tl.constexpr,
    TO_SLOTS: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (N + COLS - 1) // COLS
    EVEN: tl.constexpr = C % INNER == 0
    tiles = tl.load(num_tiles)
    tile, column_tile = tile_of(tl.program_id(0), tiles, COLUMN_TILES, GROUP)
    if (tile >= tiles) | (column_tile >= COLUMN_TILES):
        return
    expert, first, num_rows = rows_of(tile, offsets, tile_expert, tile_row, ROWS)
    row = tl.arange(0, ROWS)
    col = column_tile * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, INNER)
    if FROM_TOKENS:
        token = tl.load(order + first + row, mask=row < num_rows, other=0).to(tl.int64) // K
        row_at = rows + token[:, None] * C + inner[None, :]
    else:
        row_at = rows + first * C + tl.minimum(row, num_rows - 1)[:, None] * C + inner[None, :]
    acc = tl.zeros((ROWS, COLS), tl.float32)
    FULL: tl.constexpr = EVEN and (TRANSPOSED or N % COLS == 0)
    weight_row = (expert * (N if TRANSPOSED else C)).to(tl.int32)
    if TMA:
        weight_at = 0
    elif TRANSPOSED:
        weight_at = weights + expert * (N * C) + tl.minimum(col, N - 1)[None, :] * C + inner[:, None]
    else:
        weight_at = weights + expert * (N * C) + col[None, :] + inner[:, None] * N
    tl.assume(loop_size > 0)
    for k in range(0, loop_size, INNER):
        block = load_block(row_at, k + inner[None, :] < C, EVEN)
        there = (k + inner[:, None] < C) & (col[None, :] < N)
        if TMA and not TRANSPOSED:
            weight = weights.load([weight_row + k, column_tile * COLS])
        else:
            weight = load_transposed(weights, weight_row + column_tile * COLS, k, weight_at, there, FULL, TMA)
        acc = tl.dot(block, weight, acc, input_precision=PRECISION)
        row_at += INNER
        weight_at += INNER if TRANSPOSED else INNER * N
    there = (row < num_rows)[:, None] & (col < N)[None, :]
    if TO_SLOTS or SCALE:
        slot = tl.load(order + first + row, mask=row < num_rows, other=0).to(tl.int64)
    if SCALE:
        acc *= tl.load(scale + slot, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
    if TO_SLOTS:
        out_at = out + slot[:, None] * N + col[None, :]
    else:
        out_at = out + first * N + row[:, None] * N + col[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=there)
