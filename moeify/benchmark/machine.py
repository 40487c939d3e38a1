"""The machine a benchmark runs on: device and dtype by name, what the device is, and which versions are installed."""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from moeify.errors import UsageError, unknown
from moeify.models.device import find_device


def device_by_name(name: str) -> torch.device:
    """A device that can be timed, a CUDA device with its number.

    Raises:
        UsageError: it is not there, or is another kind.
    """
    device = find_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{name!r} is not a device that is timed", "--device takes auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def dtype_by_name(name: str, device: torch.device) -> torch.dtype:
    """A dtype: auto is bfloat16 on cuda and float32 on cpu.

    Raises:
        UsageError: it is none.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if name not in found:
        raise unknown("a dtype", name, ["auto", *found], "--dtype takes")
    return found[name]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a result has to say about where it was measured."""
    if device.type == "cpu":
        return {
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    driver = None
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver or None,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Of Python and packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in dict.fromkeys(packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
