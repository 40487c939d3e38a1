"""What the matrix products share: which tile a program computes, and how it reads its operands.

A loop's end is an argument and not a constant: the assembler of triton 3.6 unrolls some constant loops, which took 16 s
for one kernel instead of 0.7. The promise that it is positive saves up to 77 registers.

Rows or columns past an edge are read from a valid place and never stored, which costs no predicate; only the inner
dimension of a product is masked, and only where it does not divide.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(program, num_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of a program: GROUP row tiles share a block of weights while it lies in the L2 cache."""
    width: tl.constexpr = GROUP * COLUMN_TILES
    first = program // width * GROUP
    size = tl.minimum(tl.maximum(num_tiles - first, 1), GROUP)
    return first + program % width % size, program % width // size


@triton.jit
def rows_of(tile, offsets, tile_expert, tile_row, ROWS: tl.constexpr):
    """Expert of a row tile as int64, its first row as int64, and how many of its rows there are."""
    expert = tl.load(tile_expert + tile).to(tl.int64)
    first = tl.load(tile_row + tile)
    num_rows = tl.minimum(tl.load(offsets + expert + 1) - first, ROWS)
    return expert, first.to(tl.int64), num_rows


@triton.jit
def load_block(at, there, EVEN: tl.constexpr):
    """A block of an operand, zeros where it is not; EVEN says that it is there as a whole."""
    if EVEN:
        block = tl.load(at)
    else:
        block = tl.load(at, mask=there, other=0.0)
    return block


@triton.jit
def load_transposed(weights, first_row, k, at, there, EVEN: tl.constexpr, TMA: tl.constexpr):
    """The block of rows of weights from first_row on, columns from k on, as (columns, rows)."""
    if TMA:
        block = weights.load([first_row, k]).T
    else:
        block = load_block(at, there, EVEN)
    return block
