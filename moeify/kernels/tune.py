"""Finds the fastest launches for one shape on this device, and keeps them where launch.py looks.

One kernel after the other is varied while the rest stays: the whole call is timed, so that a tile which helps its own
kernel and harms the next does not win.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from moeify.kernels.launch import DECODE_TOKENS, Launch, backward_rows, forward_rows, key_of, launch_for, launching
from moeify.kernels.ops import moe_ffn
from moeify.options import TuneOptions

Time = Callable[[Callable[[], Any]], float]
# A candidate replaces a launch if it saves more than this share of the call: less is within the noise of a busy device.
MIN_GAIN = 0.01
# Too much shared memory or too many registers, or tiles that the compiler refuses.
CANNOT_RUN = (triton.runtime.errors.OutOfResources, triton.CompilationError)


@dataclass(frozen=True)
class Shape:
    """The experts of one layer.

    Args:
        dim: hidden size D.
        width: of an expert, F.
        num_experts: E.
        num_ranks: experts of a token, K.
        activation: a name of reference.ACTIVATIONS.
        gated: whether the experts have a gate projection.
        dtype: of weights and inputs.
    """

    dim: int
    width: int
    num_experts: int
    num_ranks: int
    activation: str = "silu"
    gated: bool = True
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Tuned:
    """What became of one kernel.

    Args:
        key: of the launch table.
        tokens: for which it was timed.
        launch: the fastest.
        before_us, after_us: the whole call with the launch it had and with this one, in microseconds.
        tried, failed: candidates, and how many of them the device cannot run.
    """

    key: str
    tokens: int
    launch: Launch
    before_us: float
    after_us: float
    tried: int
    failed: int


def keys_of(shape: Shape, tokens: int, *, backward: bool) -> list[str]:
    """The launches that a call for so many tokens takes."""
    slots = tokens * shape.num_ranks
    if backward:
        rows = backward_rows(slots, shape.num_experts)
        kernels = {"down_grad": rows, "input_grad": rows, "weight_grad": 128}
    elif tokens == 1:
        kernels = {"single_up": 1, "single_down": 1}
    elif tokens <= DECODE_TOKENS:
        rows = max(triton.next_power_of_2(tokens), 16)
        kernels = {"decode_up": rows, "decode_down": rows}
    else:
        rows = forward_rows(slots, shape.num_experts)
        kernels = {"up": rows, "down": rows}
    return [key_of(kernel, rows, shape.width) for kernel, rows in kernels.items()]


def candidates(key: str, launch: Launch) -> Iterator[Launch]:
    """Launches of a kernel that are worth a try; a tile stays as high as tokens were sorted for."""
    kernel = key.partition("/")[0]
    if kernel.startswith("single"):
        for rows, cols, inner, warps in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (128, 256, 512, 1024), (2, 4, 8)):
            wide, narrow = kernel == "single_up" and rows == 1, kernel == "single_down" and inner <= 512
            # Fewer weights a thread leave memory idle, more of them do not fit into registers.
            if (wide or narrow) and 16 <= rows * cols * inner // (32 * warps) <= 32:
                yield replace(launch, rows=rows, cols=cols, inner=inner, warps=warps)
    elif kernel.startswith("decode"):
        for cols, inner, warps, stages in product((16, 32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5)):
            # Eight warps have too little to do on small tiles.
            if warps == 4 or cols >= 64:
                yield replace(launch, cols=cols, inner=inner, warps=warps, stages=stages)
    elif kernel == "weight_grad":
        for rows, cols, inner, warps, stages in product((128, 256), (128, 256), (32, 64, 128), (4, 8), (2, 3, 4)):
            if rows * cols <= 128 * 256:
                yield replace(launch, rows=rows, cols=cols, inner=inner, warps=warps, stages=stages)
    else:
        for tma, cols, inner, warps, stages in product((False, True), (64, 128, 256), (32, 64, 128), (4, 8), (3, 4)):
            # `up` has two accumulators, of gate and up.
            if kernel != "up" or cols < 256:
                yield replace(launch, tma=tma, cols=cols, inner=inner, warps=warps, stages=stages)


def groupings(key: str, launch: Launch) -> Iterator[Launch]:
    """The same tiles in another order; of no matter to kernels that have none."""
    if not key.startswith(("single", "decode")):
        for group in (1, 4, 16, 32):
            yield replace(launch, group=group)


def tune(
    shape: Shape,
    tokens: Sequence[int] = TuneOptions.tokens,
    *,
    device: torch.device,
    backward: bool = True,
    time: Time | None = None,
) -> Iterator[Tuned]:
    """Tune every kernel that calls for these numbers of tokens launch, and yield each as it is done.

    What is found is not written: see launch.keep_tuned.

    Args:
        shape: of the experts.
        tokens: numbers of tokens of a call, the most important last: where two share a launch, the later one decides.
        device: a CUDA device.
        backward: whether to tune the way back as well.
        time: microseconds of a call; None means triton's own benchmark, which empties the L2 cache before each call.
    """
    time = time or _benchmark
    found: dict[str, Launch] = {}
    for number in tokens:
        for back in (False, True) if backward and number > DECODE_TOKENS else (False,):
            call = _call(shape, number, device, backward=back)
            for key in keys_of(shape, number, backward=back):
                with launching(found):
                    # The table is in terms of 2-byte elements, whatever the shape's dtype.
                    start = launch_for(key, torch.bfloat16, device)
                    tuned = _tune_one(key, number, start, call, time)
                found[key] = tuned.launch
                yield tuned


def _tune_one(key: str, tokens: int, start: Launch, call: Callable[[], Any], time: Time) -> Tuned:
    best, before = start, time(call)
    fastest, tried, failed = before, 0, 0
    for near in (candidates, groupings):
        for launch in dict.fromkeys(near(key, best)):
            if launch == best:
                continue
            tried += 1
            try:
                with launching({key: launch}):
                    took = time(call)
            except CANNOT_RUN:
                failed += 1
                continue
            if took < fastest and took < before * (1 - MIN_GAIN):
                best, fastest = launch, took
    return Tuned(key, tokens, best, before, fastest, tried, failed)


def _call(shape: Shape, tokens: int, device: torch.device, *, backward: bool) -> Callable[[], Any]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        drawn = torch.randn(sizes, generator=generator, device=device, dtype=shape.dtype)
        return drawn.mul_(sizes[-1] ** -0.5)

    rows = shape.width * (2 if shape.gated else 1)
    inputs = draw(tokens, shape.dim)
    up, down = draw(shape.num_experts, rows, shape.dim), draw(shape.num_experts, shape.dim, shape.width)
    scores = torch.rand(tokens, shape.num_experts, generator=generator, device=device)
    weights, experts = scores.topk(shape.num_ranks)
    options: Mapping[str, Any] = {"activation": shape.activation, "gated": shape.gated}
    if not backward:
        return lambda: moe_ffn(inputs, up, down, experts, weights, **options)
    leaves = [tensor.requires_grad_() for tensor in (inputs, up, down, weights)]
    out = moe_ffn(leaves[0], leaves[1], leaves[2], experts, leaves[3], **options)
    flow = draw(tokens, shape.dim)
    return lambda: torch.autograd.grad(out, leaves, flow, retain_graph=True)


def _benchmark(call: Callable[[], Any]) -> float:
    """Microseconds; of a graph where the call can be captured, so that a launch costs the same whatever the call."""
    return 1000.0 * float(triton.testing.do_bench(_replay(call), warmup=5, rep=25, return_mode="median"))


def _replay(call: Callable[[], Any]) -> Callable[[], Any]:
    if isinstance(call(), tuple):
        # Gradients: milliseconds each, next to which launches do not count.
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compile_ahead(
    shape: Shape, tokens: Sequence[int], *, device: torch.device, backward: bool = True, processes: int
) -> int:
    """Compile what `tune` will try, in processes of their own, into triton's cache: compiling is most of its time.

    Args:
        shape, tokens, device, backward: as for `tune`.
        processes: how many; each takes about 2 GB of the device's memory.

    Returns:
        How many of them failed, for want of memory, say: `tune` compiles what they leave.
    """
    values = {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
    job = json.dumps([values, list(tokens), str(device), backward, processes])
    words = [sys.executable, "-m", __name__, job]
    running = [
        subprocess.Popen([*words, str(share)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for share in range(processes)
    ]
    try:
        return sum(process.wait() != 0 for process in running)
    finally:
        for process in running:
            process.kill()


def _compile_share(
    shape: Shape, tokens: Sequence[int], device: torch.device, backward: bool, shares: int, share: int
) -> None:
    number = 0
    for count in tokens:
        for back in (False, True) if backward and count > DECODE_TOKENS else (False,):
            call = None
            for key in keys_of(shape, count, backward=back):
                for launch in candidates(key, launch_for(key, torch.bfloat16, device)):
                    number += 1
                    if number % shares != share:
                        continue
                    call = call or _call(shape, count, device, backward=back)
                    with suppress(*CANNOT_RUN), launching({key: launch}):
                        call()


def _main(job: str, share: str) -> None:
    values, tokens, device, backward, shares = json.loads(job)
    shape = Shape(**{**values, "dtype": getattr(torch, values["dtype"])})
    _compile_share(shape, tokens, torch.device(device), backward, shares, int(share))


if __name__ == "__main__":
    _main(*sys.argv[1:])
