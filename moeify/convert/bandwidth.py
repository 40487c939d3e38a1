"""What this machine reads of its memory in a second: the fastest of repeated passes over more than caches hold."""

import time
from collections.abc import Callable

import psutil
import torch

# More than a processor caches; a quarter of the free memory if that is less.
CPU_BYTES = 1 << 30
GPU_BYTES = 2 << 30
PASSES = 6
COLUMNS = 16_384


def ram_read_rate(threads: int, num_bytes: int = CPU_BYTES) -> float:
    """Bytes per second that so many threads read, in a product of a matrix with a vector: decode does nothing else.

    float32 gives a processor little to do for each byte. Of sum, maximum, copy, dot product and this one it was the
    fastest, by 5 to 40 %, on one and two threads of an Intel Xeon (2026-11-26).
    """
    num_bytes = min(num_bytes, psutil.virtual_memory().available // 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = torch.ones(max(1, num_bytes // (4 * COLUMNS)), COLUMNS)
        vector = torch.ones(COLUMNS)
        return matrix.nbytes / _fastest(lambda: torch.mv(matrix, vector))
    finally:
        torch.set_num_threads(before)


def gpu_read_rate(device: int = 0) -> float:
    """The same of a GPU, in float16, as far as its memory is free."""
    free, _ = torch.cuda.mem_get_info(device)
    rows = max(1, min(GPU_BYTES, free // 2) // (2 * COLUMNS))
    matrix = torch.ones(rows, COLUMNS, dtype=torch.float16, device=f"cuda:{device}")
    vector = torch.ones(COLUMNS, dtype=torch.float16, device=f"cuda:{device}")

    def read() -> None:
        torch.mv(matrix, vector)
        torch.cuda.synchronize(device)

    return matrix.nbytes / _fastest(read)


def _fastest(read: Callable[[], object]) -> float:
    """Seconds of the fastest pass: another process can only slow one down."""
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
