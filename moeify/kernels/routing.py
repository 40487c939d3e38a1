"""Which rows go to which expert: a stable counting sort, and the table of row tiles that the matrix products walk.

Nothing here waits for the device: the number of tiles stays there, and launches are sized by its upper bound.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeify.kernels.launch import COMPILED

# Ids that one program of the sort reads. Its offsets come from summing all programs' counts, which it does itself: a
# scan would be one more launch. So many programs that each has little to do one after the other, and few enough that
# their counts are soon read: 256 of 64 experts are 64 KiB.
SLOTS_A_PROGRAM, PROGRAMS = (64, 1024), 256
# Up to so many one program counts and places, which saves a launch.
SLOTS_ALONE = 256
# Elements of the (ids, experts) comparison that a program holds at once: 32 a thread.
COMPARED_AT_ONCE = 4096


@dataclass(frozen=True)
class Routing:
    """The slots in the order of their experts; rows of the sorted order are what the matrix products compute.

    Args:
        order_S: slot (token * K + rank) of each sorted row, int32; rows past offsets[-1] hold nothing.
        offsets: (E + 1) first row of each expert, int32.
        tile_expert, tile_row: expert and first row of each tile, int32, of which the first num_tiles count.
        num_tiles: (1), int32.
        rows_per_tile: rows of a tile; no tile holds rows of two experts.
    """

    order_S: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    num_tiles: Tensor
    rows_per_tile: int

    @property
    def max_tiles(self) -> int:
        return len(self.tile_expert)


def route(experts_TK: Tensor, num_experts: int, rows_per_tile: int) -> Routing:
    """Sort the slots by expert, within an expert by token.

    Args:
        experts_TK: expert ids, int64; ids of num_experts and more are left out.
        num_experts: experts whose weights are here.
        rows_per_tile: rows of a tile.
    """
    num_slots, device = experts_TK.numel(), experts_TK.device
    max_tiles = min(triton.cdiv(num_slots, rows_per_tile) + num_experts, num_slots)
    width = max(triton.next_power_of_2(num_experts), 2)
    slots = SLOTS_ALONE
    if num_slots > SLOTS_ALONE:
        least, most = SLOTS_A_PROGRAM
        slots = min(max(triton.next_power_of_2(triton.cdiv(num_slots, PROGRAMS)), least), most)
    chunk = max(min(COMPARED_AT_ONCE // width, 128), 16)
    programs = triton.cdiv(num_slots, slots)

    def empty(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.int32, device=device)

    counts = empty(programs * width)
    routing = Routing(
        order_S=empty(num_slots),
        offsets=empty(num_experts + 1),
        tile_expert=empty(max_tiles),
        tile_row=empty(max_tiles),
        num_tiles=empty(1),
        rows_per_tile=rows_per_tile,
    )
    sizes: dict[str, Any] = dict(NUM_EXPERTS=num_experts, WIDTH=width, SLOTS=slots, **COMPILED)
    if programs > 1:
        count_kernel[(programs,)](experts_TK, counts, num_slots, **sizes)
    place_kernel[(programs,)](
        experts_TK,
        counts,
        routing.order_S,
        routing.offsets,
        routing.tile_expert,
        routing.tile_row,
        routing.num_tiles,
        num_slots,
        programs,
        ALONE=programs == 1,
        TILE_ROWS=rows_per_tile,
        CHUNK=min(chunk, slots),
        PROGRAMS_AT_ONCE=chunk,
        **sizes,
    )
    return routing


@triton.jit
def count_ids(experts, slot, there, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr):
    """How often these slots name each expert."""
    chosen = tl.load(experts + slot, mask=there, other=NUM_EXPERTS)
    return tl.histogram(chosen.to(tl.int32), WIDTH, mask=chosen < NUM_EXPERTS)


@triton.jit
def count_kernel(
    experts,
    counts,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """counts (programs, WIDTH): how often each expert stands among a program's ids."""
    program = tl.program_id(0)
    slot = program * SLOTS + tl.arange(0, SLOTS)
    count = count_ids(experts, slot, slot < num_slots, NUM_EXPERTS, WIDTH)
    tl.store(counts + program * WIDTH + tl.arange(0, WIDTH), count)


@triton.jit
def place_kernel(
    experts,
    counts,
    order,
    offsets,
    tile_expert,
    tile_row,
    num_tiles,
    num_slots,
    programs,
    ALONE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PROGRAMS_AT_ONCE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write each slot to its row; the tile table is shared out among the programs."""
    program = tl.program_id(0)
    expert = tl.arange(0, WIDTH)
    before = tl.zeros((WIDTH,), tl.int32)
    total = tl.zeros((WIDTH,), tl.int32)
    if ALONE:
        every = tl.arange(0, SLOTS)
        total = count_ids(experts, every, every < num_slots, NUM_EXPERTS, WIDTH)
    else:
        for first in range(0, programs, PROGRAMS_AT_ONCE):
            other = first + tl.arange(0, PROGRAMS_AT_ONCE)
            count = tl.load(counts + other[:, None] * WIDTH + expert[None, :], mask=other[:, None] < programs, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(other[:, None] < program, count, 0), 0)
    start = tl.cumsum(total, 0) - total
    tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    end_tile = tl.cumsum(tiles, 0)
    all_tiles = tl.sum(tiles, 0)
    if program == 0:
        tl.store(offsets + expert, start, mask=expert < NUM_EXPERTS)
        tl.store(offsets + NUM_EXPERTS, tl.sum(total, 0))
        tl.store(num_tiles, all_tiles)
    for first in range(program * CHUNK, all_tiles, programs * CHUNK):
        tile = first + tl.arange(0, CHUNK)
        nth = tile[:, None] - (end_tile - tiles)[None, :]
        inside = (nth >= 0) & (nth < tiles[None, :])
        tl.store(tile_expert + tile, tl.sum(tl.where(inside, expert[None, :], 0), 1), mask=tile < all_tiles)
        row = tl.sum(tl.where(inside, start[None, :] + nth * TILE_ROWS, 0), 1)
        tl.store(tile_row + tile, row, mask=tile < all_tiles)
    place = start + before
    for first in range(0, tl.minimum(SLOTS, num_slots - program * SLOTS), CHUNK):
        slot = program * SLOTS + first + tl.arange(0, CHUNK)
        chosen = tl.load(experts + slot, mask=slot < num_slots, other=NUM_EXPERTS).to(tl.int32)
        here = (chosen[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(here, 0) - here
        row = tl.sum(here * (place[None, :] + rank), 1)
        tl.store(order + row, slot, mask=chosen < NUM_EXPERTS)
        place += tl.sum(here, 0)
