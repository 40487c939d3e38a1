"""Sums of rows in a fixed order, in float32: no atomics, so the same bits every time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.launch import COMPILED

COLUMNS = 1024


def combine(rows_GND: Tensor, keys_GN: Tensor | None, num_keys: int, dtype: torch.dtype) -> Tensor:
    """The sum over N of each group's rows.

    Args:
        rows_GND: contiguous.
        keys_GN: expert ids, of which those of num_keys and more mark rows that hold nothing; None: all rows count.
        num_keys: number of experts.
        dtype: of the result.

    Returns:
        (G, D).
    """
    groups, num_rows, dim = rows_GND.shape
    out_GD = rows_GND.new_empty(groups, dim, dtype=dtype)
    columns = min(triton.next_power_of_2(dim), COLUMNS)
    combine_kernel[(groups, triton.cdiv(dim, columns))](
        rows_GND,
        rows_GND if keys_GN is None else keys_GN,
        out_GD,
        N=num_rows,
        D=dim,
        KEYED=keys_GN is not None,
        NUM_KEYS=num_keys,
        COLUMNS=columns,
        **COMPILED,
    )
    return out_GD


@triton.jit
def combine_kernel(
    rows,
    keys,
    out,
    N: tl.constexpr,
    D: tl.constexpr,
    KEYED: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), tl.float32)
    for n in range(N):
        counts = True
        if KEYED:
            counts = tl.load(keys + group * N + n) < NUM_KEYS
        if counts:
            acc += tl.load(rows + (group * N + n) * D + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(out + group * D + col, acc.to(out.dtype.element_ty), mask=col < D)
