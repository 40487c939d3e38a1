"""The machine a model shall run on: what is told of it, and what is measured here.

A bandwidth is that of the fastest part of repeated passes over more than caches hold: others only slow one down.
"""

import os
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch

from moeify.convert.placement import Machine
from moeify.errors import UsageError
from moeify.options import MachineOptions
from moeify.words import number

# More than a processor caches; a quarter of the free memory if that is less.
CPU_BYTES = 1 << 30
GPU_BYTES = 2 << 30
PASSES = 4
COLUMNS = 16_384
# 32 MiB of float32 are read in less time than a busy machine gives to one process at once: with 18 processes waiting
# for 2 cores, the fastest of such parts gave 14.6 and 25 GB/s on 1 and 2 threads, the fastest whole pass 2.9 and 2.5;
# by processor time it was 14.0 a thread (2 cores of an Intel Xeon, 2026-11-26).
PART_ROWS = 512


def machine_of(options: MachineOptions) -> Machine:
    """The machine that options describe; what they leave open is measured here.

    Raises:
        UsageError: a GPU or threads are described that are not here, without their bandwidth.
    """
    vram, ram, measured = options.size("vram"), options.size("ram"), []
    has_gpu = torch.cuda.is_available()
    gpu_rate = (options.gpu_bandwidth or 0.0) * 1e9
    if vram is None:
        if options.gpu_bandwidth is not None:
            raise UsageError("--gpu-bandwidth says nothing of the GPU's memory", "say --vram 6GB as well")
        vram = torch.cuda.get_device_properties(0).total_memory if has_gpu else 0
    if vram and not gpu_rate:
        if not has_gpu:
            raise UsageError(
                "there is no GPU here whose bandwidth could be measured",
                "say --gpu-bandwidth 250, in GB/s, or --vram 0",
            )
        gpu_rate = gpu_read_rate()
        measured.append(f"GPU {number(gpu_rate / 1e9)} GB/s")
    threads, ram_rate = options.threads, (options.ram_bandwidth or 0.0) * 1e9
    if not ram_rate:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = threads or min(cores, psutil.cpu_count(logical=False) or cores)
        if threads > cores:
            raise UsageError(
                f"{threads} threads cannot be measured on {cores} cores", "say --ram-bandwidth, or fewer --threads"
            )
        ram_rate = ram_read_rate(threads)
        measured.append(f"RAM {number(ram_rate / 1e9)} GB/s on {threads} thread{'s' if threads > 1 else ''}")
        # The RAM is this machine's.
        ram = ram if ram is not None else psutil.virtual_memory().total
    return Machine(vram, gpu_rate, ram, ram_rate, threads, ", ".join(measured))


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
        rates = [p.nbytes / _seconds(partial(torch.mv, p, vector)) for p in matrix.split(PART_ROWS) * PASSES]
        return float(max(rates))
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

    return matrix.nbytes / min(_seconds(read) for _ in range(PASSES))


def _seconds(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start
