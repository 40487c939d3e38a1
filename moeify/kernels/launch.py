"""How the kernels are launched: tile sizes, warps and pipeline stages, from a checked-in table.

Nothing is tuned while a model runs. `moeify tune` measures candidates once and keeps the winners in a file that is read
here and goes before the table.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from moeify.cache import cache_dir, replacing
from moeify.errors import InputError

# Tokens up to which a call without gradients takes the road of decode.py.
DECODE_TOKENS = 64
# Said to every kernel: the default of multiply and add in one rounding changes in triton 3.10.
COMPILED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One kernel's tiles.

    Args:
        rows, cols, inner: of the tile that a program computes and of the block it reads at a time; powers of two.
        warps: of a program.
        stages: blocks in flight.
        group: row tiles that walk over the columns together.
        tma: whether weights come through the bulk copy engine, which only Hopper and later have.
    """

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False

    def cols_for(self, width: int) -> int:
        """Columns of a tile, where the whole matrix may be narrower."""
        return max(min(self.cols, int(triton.next_power_of_2(width))), 16)

    def row_programs(self, max_tiles: int) -> int:
        return -(-max_tiles // self.group) * self.group

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """What every matrix product is launched with; the columns depend on the matrix."""
        return {
            "PRECISION": precision(dtype),
            "ROWS": self.rows,
            "INNER": self.inner,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **COMPILED,
        }


# Experts up to so wide have launches of their own, where a key ends in /narrow: the product with `down` has few steps
# then, and most of its time goes into what it writes. 8,192 tokens forward, wide and narrow launches: width 224 2,050
# and 1,950 us, 256 1,722 and 1,719, 384 1,308 and 1,343 (H200, clock of tune.py, 2026-11-26).
NARROW = 256

# Keys are kernel/rows. Measured on an H200 with triton 3.6 (kernels/README.md); compiled for sm_90 with triton 3.6 and
# 3.9 none of them spills a register or exceeds 227 KiB of shared memory (tests/kernels/test_kernels_compile.py).
TABLE: Mapping[str, Launch] = {
    "up/16": Launch(16, 64, 128, 4, 4),
    "up/32": Launch(32, 64, 128, 4, 4),
    "up/64": Launch(64, 128, 64, 8, 4),
    "up/128": Launch(128, 128, 64, 8, 3),
    "up/128/narrow": Launch(128, 128, 64, 8, 3, group=1, tma=True),
    "down/16": Launch(16, 64, 128, 4, 4),
    "down/32": Launch(32, 64, 128, 4, 4),
    "down/64": Launch(64, 128, 64, 4, 4),
    "down/128": Launch(128, 256, 64, 8, 4, group=32),
    "down/128/narrow": Launch(128, 128, 32, 4, 4, group=16, tma=True),
    "down_grad/64": Launch(64, 128, 64, 4, 4),
    "down_grad/128": Launch(128, 256, 64, 8, 4, group=4),
    "input_grad/64": Launch(64, 128, 64, 4, 4),
    "input_grad/128": Launch(128, 256, 64, 8, 3, group=16),
    "input_grad/128/narrow": Launch(128, 128, 32, 4, 4, group=32, tma=True),
    "weight_grad/128": Launch(128, 128, 64, 4, 2, group=1),
    # One token: columns of the output and what is read of each of their rows at a time; `single_down` reads so many
    # experts (rows) at once.
    "single_up/1": Launch(1, 4, 512, 4, 1),
    "single_down/1": Launch(4, 4, 256, 4, 1),
    "single_down/1/narrow": Launch(4, 4, 128, 2, 1),
    # Tokens are read once for each block of columns, through the L2 cache that the weights come through as well: the
    # more tokens, the wider the block.
    "decode_up/16": Launch(16, 128, 128, 4, 3),
    "decode_up/16/narrow": Launch(16, 64, 64, 4, 5),
    "decode_up/32": Launch(32, 64, 64, 4, 5),
    "decode_up/64": Launch(64, 64, 64, 4, 4),
    "decode_down/16": Launch(16, 128, 128, 4, 4),
    "decode_down/16/narrow": Launch(16, 64, 128, 4, 4),
    "decode_down/32": Launch(32, 64, 128, 4, 4),
    "decode_down/64": Launch(64, 128, 64, 4, 4),
}

_overrides: dict[str, Launch] = {}


def key_of(kernel: str, rows: int, width: int) -> str:
    """The table's key.

    Args:
        kernel: up, down, down_grad, input_grad, weight_grad, single_up, single_down, decode_up or decode_down.
        rows: of its tiles.
        width: of an expert, F.
    """
    narrow = f"{kernel}/{rows}/narrow"
    return narrow if width <= NARROW and narrow in TABLE else f"{kernel}/{rows}"


def launch_for(key: str, dtype: torch.dtype, device: torch.device) -> Launch:
    """The launch of a kernel.

    Args:
        key: as `key_of` gives it.
        dtype: of the operands. Tiles of 4-byte elements are narrower, so that they fill the same shared memory.
        device: whose tuned launches count.
    """
    launch = _overrides.get(key) or tuned(device).get(key) or TABLE[key]
    if dtype.itemsize > 2:
        launch = replace(launch, cols=min(launch.cols, 64), inner=max(launch.inner // 4, 16))
    return launch


def forward_rows(num_slots: int, num_experts: int) -> int:
    """Rows of a tile, so that few of them are padding: from the mean number of rows of an expert."""
    mean = num_slots / num_experts
    return 16 if mean <= 12 else 32 if mean <= 24 else 64 if mean <= 72 else 128


def backward_rows(num_slots: int, num_experts: int) -> int:
    return 64 if num_slots / num_experts <= 72 else 128


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as torch's own, exactly unless TensorFloat-32 is allowed."""
    # Not allow_tf32: reading it raises once a program has set fp32_precision, which knows of both ways.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def weights_argument(weights: Tensor, block: tuple[int, int], *, bulk: bool) -> tuple[Any, bool]:
    """How a kernel gets at all experts' weights.

    Args:
        weights: (E, rows, columns), contiguous.
        block: rows and columns that are read at a time.
        bulk: whether to read by the bulk copy engine.

    Returns:
        The kernel's argument, and whether that is a description for the copy engine: it only takes rows of whole 16
        bytes.
    """
    if not bulk or weights.shape[2] * weights.itemsize % 16 or not has_copy_engine(weights.device):
        return weights, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weights.flatten(0, 1), list(block)), True


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether it is Hopper or later; the interpreter has one as well."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@contextmanager
def launching(launches: Mapping[str, Launch]) -> Iterator[None]:
    """Inside the block these go before the tuned and the checked-in ones; for tuning and tests."""
    before = dict(_overrides)
    _overrides.update(launches)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def tuned_file(device: torch.device) -> Path:
    """Where `moeify tune` keeps what it found for this kind of device and this triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} triton {triton.__version__}".lower())
    return cache_dir() / "launch" / f"{slug}.json"


@functools.cache
def tuned(device: torch.device) -> Mapping[str, Launch]:
    """What `moeify tune` kept; empty before it ran.

    Raises:
        InputError: the file is not one of its own.
    """
    path = tuned_file(device)
    if not path.is_file():
        return {}
    try:
        launches = json.loads(path.read_text(encoding="utf-8"))["launches"]
        return {key: Launch(**launch) for key, launch in launches.items() if key in TABLE}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no launches of moeify tune: {error}", "delete it") from error


def keep_tuned(device: torch.device, launches: Mapping[str, Launch]) -> Path:
    """Write what was found for a device; what an earlier run found for other keys stays."""
    path = tuned_file(device)
    kept = {**tuned(device), **launches}
    found = {"schema": "moeify.launch/1", "launches": {key: asdict(launch) for key, launch in sorted(kept.items())}}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2), encoding="utf-8")
    tuned.cache_clear()
    return path
