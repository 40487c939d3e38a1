"""Where weights lie and what follows, against numbers worked out by hand."""

from dataclasses import replace

import pytest

from moeify.convert.placement import RESERVE_BYTES, Machine, Weights, place

MB = 1_000_000
# 4 layers of 10 MB always on, 5 MB of cache, 100 MB of experts of which a token reads 40; a head and a table of 20 MB.
WEIGHTS = Weights(4, 10 * MB, 5 * MB, 100 * MB, 40 * MB, 20 * MB, 20 * MB, tied=True, buffer_bytes=30 * MB)
ALWAYS = 20 + 4 * 15
MACHINE = Machine(0, 100e9, None, 10e9)


def with_room(megabytes: int) -> Machine:
    """Whose GPU has so much for weights and cache."""
    return replace(MACHINE, vram_bytes=RESERVE_BYTES + WEIGHTS.buffer_bytes + megabytes * MB)


def test_without_a_gpu_everything_is_read_from_ram() -> None:
    placement = place(WEIGHTS, MACHINE, routed=True, context=512)
    assert (placement.gpu_read_bytes, placement.ram_read_bytes) == (0, (ALWAYS + 4 * 40) * MB)
    # The table is the head: once. 240 MB at 10 GB/s are 24 ms.
    assert (placement.vram_bytes, placement.ram_bytes) == (0, (ALWAYS + 400 + 30) * MB)
    assert placement.tokens_per_second == pytest.approx(1 / 0.024)
    assert placement.flags == "-ngl 0 -c 512"


# Room on the GPU -> layers there, layers with their experts there, MB read on the GPU and from RAM, flags of a MoE
# model and of a dense one.
ROOMS = {
    19: (0, 0, 0, 240, "-ngl 0", "-ngl 0"),
    20: (0, 0, 20, 220, "-ngl 1", "-ngl 1"),
    34: (0, 0, 20, 220, "-ngl 1", "-ngl 1"),
    35: (1, 0, 35, 205, "-ngl 2 --cpu-moe", "-ngl 2 --n-cpu-ffn 4"),
    79: (3, 0, 65, 175, "-ngl 4 --cpu-moe", "-ngl 4 --n-cpu-ffn 4"),
    80: (4, 0, 80, 160, "-ngl 99 --cpu-moe", "-ngl 99 --n-cpu-ffn 4"),
    179: (4, 0, 80, 160, "-ngl 99 --cpu-moe", "-ngl 99 --n-cpu-ffn 4"),
    180: (4, 1, 120, 120, "-ngl 99 --n-cpu-moe 3", "-ngl 99 --n-cpu-ffn 3"),
    380: (4, 3, 200, 40, "-ngl 99 --n-cpu-moe 1", "-ngl 99 --n-cpu-ffn 1"),
    480: (4, 4, 240, 0, "-ngl 99", "-ngl 99"),
    9000: (4, 4, 240, 0, "-ngl 99", "-ngl 99"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_gpu_takes_what_is_always_read_first(room: int) -> None:
    layers, with_experts, gpu_read, ram_read, moe, ffn = ROOMS[room]
    placement = place(WEIGHTS, with_room(room), routed=True, context=512)
    assert (placement.gpu_layers, placement.gpu_ffn_layers) == (layers, with_experts)
    assert (placement.gpu_read_bytes, placement.ram_read_bytes) == (gpu_read * MB, ram_read * MB)
    assert placement.tokens_per_second == pytest.approx(1 / (gpu_read * MB / 100e9 + ram_read * MB / 10e9))
    assert placement.flags == f"{moe} -c 512"
    assert place(WEIGHTS, with_room(room), routed=False, context=512).flags == f"{ffn} -c 512"
    assert placement.vram_bytes <= with_room(room).vram_bytes
    # Both sides together: all of it, with a table in RAM beside the head on the GPU.
    on_gpu = placement.vram_bytes - RESERVE_BYTES - 30 * MB if room >= 20 else 0
    assert placement.ram_bytes == (ALWAYS + 400 + 30 + (20 if room >= 20 else 0)) * MB - on_gpu


def test_a_gpu_never_slows_a_bound_down() -> None:
    speeds = [place(WEIGHTS, with_room(room), routed=True, context=512).tokens_per_second for room in sorted(ROOMS)]
    assert speeds == sorted(speeds)
    assert speeds[-1] == pytest.approx(10 * speeds[0])


def test_an_untied_head_is_beside_its_table_everywhere() -> None:
    untied = replace(WEIGHTS, tied=False)
    assert place(untied, MACHINE, routed=True, context=512).ram_bytes == (ALWAYS + 20 + 400 + 30) * MB


def test_threads_and_many_layers_reach_the_flags() -> None:
    machine = replace(with_room(100_000), threads=6)
    assert place(replace(WEIGHTS, num_layers=126), machine, routed=True, context=8192).flags == "-ngl 127 -c 8192 -t 6"


def test_too_little_ram_is_said_with_numbers() -> None:
    small = replace(MACHINE, ram_bytes=509 * MB)
    assert place(WEIGHTS, small, routed=True, context=512).refusal == "needs 510 MB of RAM, there are 509 MB"
    assert place(WEIGHTS, replace(small, ram_bytes=510 * MB), routed=True, context=512).refusal == ""
    # A GPU of the right size makes it fit.
    assert place(WEIGHTS, replace(with_room(180), ram_bytes=509 * MB), routed=True, context=512).refusal == ""
