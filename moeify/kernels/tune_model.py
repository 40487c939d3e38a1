"""Finds the fastest kernel launches for a model's experts on this machine; every later process here uses them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeify.command_line import several
from moeify.errors import InputError, warn
from moeify.kernels import experts, launch
from moeify.kernels.tune import Shape, Tuned, compile_ahead, keys_of, tune
from moeify.models.config import empty_model, load_config
from moeify.models.files import locate
from moeify.options import Track, TuneOptions
from moeify.progress import shown
from moeify.readable import Readable

# That compile at once; each takes about 2 GB of the device's memory.
PROCESSES = 8


@dataclass(frozen=True, repr=False)
class TuneResult(Readable):
    """What was found.

    Args:
        model, device: what was tuned where.
        file: the launches are kept in.
        dim, width, num_experts, num_ranks: hidden size, width of an expert, routed experts, and those of a token.
        kernels: one after the other, in the order they were tuned.
    """

    model: str
    device: str
    file: Path
    dim: int
    width: int
    num_experts: int
    num_ranks: int
    kernels: tuple[Tuned, ...]


def tune_model(
    model: str | Path,
    tokens: int | Sequence[int] = TuneOptions.tokens,
    *,
    device: str = TuneOptions.device,
    backward: bool = TuneOptions.backward,
    track: Track[Any] = shown,
) -> TuneResult:
    """Tune the kernels for the experts of a model and keep what was found.

    Args:
        model: a folder, a .gguf file or a hub id of a mixture of experts; only its configuration is read.
        tokens: numbers of tokens of a call, the most important last.
        device: a CUDA device.
        backward: whether to tune the way back as well.
        track: wraps the loop over kernels.

    Raises:
        InputError: there is no such device, or the kernels do not run this model.

    Example:
        moeify.tune_model("my-moe", [1, 8, 512], device="cuda")
    """
    model, tokens = str(model), several(tokens)
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device here, and kernels are tuned for one", "a CPU needs no tuning")
    where, shape = torch.device(device), experts_shape(model)
    launches = sum(len(keys_of(shape, count, backward=False)) for count in tokens)
    launches += sum(len(keys_of(shape, count, backward=True)) for count in tokens if count > launch.DECODE_TOKENS)
    # Compiling takes most of the time, and one process does it one by one.
    processes = min(os.cpu_count() or 1, PROCESSES)
    if failed := compile_ahead(shape, tokens, device=where, backward=backward, processes=processes):
        warn(f"{failed} of {processes} processes that compile ahead failed: tuning takes longer")
    found = []
    for tuned in track(tune(shape, tokens, device=where, backward=backward), f"tuning for {device}", launches):
        found.append(tuned)
        # Kept one by one: what was found survives an interruption.
        file = launch.keep_tuned(where, {tuned.key: tuned.launch})
    name = torch.cuda.get_device_name(where)
    return TuneResult(model, name, file, shape.dim, shape.width, shape.num_experts, shape.num_ranks, tuple(found))


def experts_shape(model: str) -> Shape:
    """The shape of a model's experts, from its configuration alone.

    Raises:
        InputError: it has none, or none that the kernels run.
    """
    config = load_config(locate(model))
    built = empty_model(config, buffers=False)
    modules: list[Any] = [
        module for module in built.modules() if hasattr(module, "has_gate") and hasattr(module, "act_fn")
    ]
    if not modules:
        raise InputError(f"{model} ({config.model_type}) has no experts", "moeify split makes some")
    found = modules[0]
    reason = experts.unsupported_module(found)
    if reason is not None:
        raise InputError(
            f"the kernels do not run the experts of {model}: {reason}",
            "transformers runs them as eager, batched_mm or grouped_mm; nothing is to be tuned",
        )
    num_experts, _, dim = experts.first_projection(found).shape
    return Shape(
        dim=dim,
        width=int(found.down_proj.shape[2]),
        num_experts=num_experts,
        num_ranks=config.get_text_config().num_experts_per_tok,
        activation=str(experts.activation_name(found.act_fn)),
        gated=bool(found.has_gate),
        dtype=built.dtype,
    )
