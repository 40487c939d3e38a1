"""What the machine itself reaches in the same run: copy bandwidth and matrix product rate, a roofline's two ends."""

import statistics
from dataclasses import dataclass

import torch

from moeify.benchmark.timing import Timer, release_memory

# Sizes that fill a data centre GPU, and sizes that a few CPU cores do in tens of milliseconds.
COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
WARM_UP = 3


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: the roofline that times are compared with.

    Args:
        copy_bytes_per_second: copy within the device, bytes read plus bytes written.
        matmul_flops_per_second: square matrix product of random numbers, 2 n^3 operations.
        matmul_size: n.
        dtype: of the matrix product.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float
    matmul_size: int
    dtype: str


def measure_ceilings(timer: Timer, dtype: torch.dtype) -> Ceilings:
    """Copy bandwidth and matrix product rate, each the median of repeated calls on random data."""
    copy_bytes_per_second = _copy_rate(timer, dtype)
    release_memory()
    matmul_flops_per_second = _matmul_rate(timer, dtype)
    release_memory()
    return Ceilings(
        copy_bytes_per_second=copy_bytes_per_second,
        matmul_flops_per_second=matmul_flops_per_second,
        matmul_size=MATMUL_SIZE[timer.device.type],
        dtype=str(dtype).removeprefix("torch."),
    )


def _copy_rate(timer: Timer, dtype: torch.dtype) -> float:
    source = _random(timer, dtype, COPY_BYTES[timer.device.type] // dtype.itemsize)
    target = torch.empty_like(source)
    seconds = timer.consecutive(lambda: target.copy_(source), WARM_UP + 20)[WARM_UP:]
    return 2 * source.nbytes / statistics.median(seconds)


def _matmul_rate(timer: Timer, dtype: torch.dtype) -> float:
    size = MATMUL_SIZE[timer.device.type]
    left, right = _random(timer, dtype, size, size), _random(timer, dtype, size, size)
    seconds = timer.consecutive(lambda: left @ right, WARM_UP + 20)[WARM_UP:]
    return 2 * size**3 / statistics.median(seconds)


def _random(timer: Timer, dtype: torch.dtype, *size: int) -> torch.Tensor:
    """Zeros multiply faster than real data on some devices."""
    generator = torch.Generator(timer.device).manual_seed(0)
    return torch.randn(*size, generator=generator, device=timer.device, dtype=dtype)
