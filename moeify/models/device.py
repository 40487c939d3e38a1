"""Devices by their names: which are here, which one `auto` is, and what they are good at."""

import torch

from moeify.errors import UsageError


def find_device(name: str) -> torch.device:
    """A device of this machine; auto is cuda if there is one, cpu otherwise.

    Raises:
        UsageError: there is none of that name, or torch was built without it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # Some names are known to every torch and work with one that was built for them.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UsageError(
            f"{name!r:.100} is not a device of this machine", f"--device takes {', '.join(here)} here"
        ) from error
    return device


def halves_are_fast(device: str) -> bool:
    """Whether bfloat16 products beat those in float32: on CUDA devices, and on CPUs with units for matrices (AMX).

    One core of an Intel Xeon, SmolLM2-135M, processor time (PyTorch 2.13, 2026-11-26): a step of 512 tokens of stage
    `full`, 32 experts, 4.5 s in bfloat16 and 7.1 s in float32; 1,536 tokens of its own text 3.3 s and 6.1 s.
    """
    if device != "cpu":
        return device.startswith("cuda")
    # Where torch was not built for x86 it may lack the question.
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported())
