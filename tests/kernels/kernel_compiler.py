"""Compile every kernel as it would be launched for a model, for a GPU that need not be there, and say what came out.

    python tests/kernels/kernel_compiler.py --target 90 --dim 4096 --width 1792 --dtype bfloat16

The host functions run on meta tensors; instead of launching, each kernel is compiled with exactly the arguments it was
given. TRITON_INTERPRET must not be set: it changes what @triton.jit returns. One JSON object a line on stdout.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia_backend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moeify.kernels import launch, ops
from moeify.kernels.decode import decode
from moeify.kernels.single import single

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)")


class Compiler:
    """Takes the place of a launch."""

    def __init__(self, target: int) -> None:
        self.target, self.found = target, {}

    def __call__(self, kernel: JITFunction, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        options = {name: named[name] for name in OPTIONS if name in named}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | {
            name: value for name, value in named.items() if name not in OPTIONS
        }
        constants, signature, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                constants[parameter.name], signature[parameter.name] = value, "constexpr"
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
            elif isinstance(value, int):
                signature[parameter.name] = "i32"
            else:
                signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        key = (kernel.__name__, repr(sorted(constants.items(), key=str)), repr(signature), repr(options))
        if key not in self.found:
            source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
            self.found[key] = self._compile(kernel.__name__, source, constants, options)

    def _compile(self, name: str, source: ASTSource, constants: dict[str, Any], options: dict[str, Any]) -> dict:
        started = time.perf_counter()
        made = triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options)
        seconds = time.perf_counter() - started
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            tool = Path(nvidia_backend).parent / "bin" / "cuobjdump"
            said = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack, local = (int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK", "LOCAL"))
        ptx = made.asm["ptx"]
        tile = {size: constants[size] for size in ("ROWS", "COLS", "INNER", "TMA", "GATED") if size in constants}
        return {
            "kernel": name,
            **tile,
            **{name: options.get(name) for name in ("num_warps", "num_stages")},
            "registers": registers,
            "spill_bytes": stack + local,
            "shared_bytes": made.metadata.shared,
            "wgmma": ptx.count("wgmma.mma_async"),
            "mma": ptx.count("mma.sync"),
            "copy_bytes": sorted({int(size, 0) for size in COPY.findall(ptx)}),
            "bulk_copies": ptx.count("cp.async.bulk.tensor"),
            "seconds": round(seconds, 2),
        }


@contextmanager
def compiling(target: int) -> Iterator[Compiler]:
    """Inside the block launches compile instead."""
    compiler = Compiler(target)

    def instead(kernel: JITFunction, grid: Any) -> Any:
        return lambda *arguments, **named: compiler(kernel, arguments, named)

    engine = mock.patch.object(launch, "has_copy_engine", return_value=target >= 90)
    with mock.patch.object(JITFunction, "__getitem__", instead), mock.patch.object(torch.cuda, "device_of"), engine:
        yield compiler


# With 8 of 64 experts these take every tile height of the table.
TOKENS = (1, 9, 32, 64, 80, 256, 512, 8192)


def kernels(
    target: int,
    dim: int,
    width: int,
    dtype: torch.dtype,
    tokens: Sequence[int] = TOKENS,
    *,
    gated: bool = True,
    biased: bool = False,
    tma: bool = False,
) -> list:
    """What moe_ffn launches, there and back, for 64 experts of which 8 are asked for."""
    experts, ranks, activation = 64, 8, "silu" if gated else "gelu_tanh" if biased else "relu2"
    meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    up = torch.empty(experts, width * (2 if gated else 1), dim, **meta)
    down = torch.empty(experts, dim, width, **meta)
    bias = torch.empty(up.shape[:2], **meta) if biased else None
    launches = {
        key: found if not tma else replace(found, tma=True)
        for key, found in launch.TABLE.items()
        if not key.startswith(("single", "decode", "weight_grad"))
    }
    with compiling(target) as compiler, launch.launching(launches if tma else {}):
        for number in tokens:
            inputs = torch.empty(number, dim, **meta)
            ids = torch.empty(number, ranks, device="meta", dtype=torch.int64)
            weights = torch.empty(number, ranks, device="meta", dtype=torch.float32)
            tensors = (inputs, up, down, ids, weights, bias)
            if number <= launch.DECODE_TOKENS:
                (single if number == 1 else decode)(*tensors, activation=activation, gated=gated)
                continue
            ops._sorted(*tensors, None, activation, gated)
            pre = torch.empty(number * ranks, up.shape[1], **meta)
            ops._sorted(*tensors, pre, activation, gated)
            ops._backward._init_fn(inputs, *tensors, pre, activation, [*[True] * 4, biased])
    return list(compiler.found.values())


def markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table: a row for each kernel and tile, the largest of those that differ in something else."""
    columns = ("registers", "spill_bytes", "shared_bytes")
    lines = ["| kernel | tile | warps | stages | registers | spilled bytes | shared KiB | matrix instructions |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        tile = "x".join(str(row[size]) for size in ("ROWS", "COLS", "INNER") if size in row)
        kind = "wgmma" if row["wgmma"] else "mma" if row["mma"] else ""
        key = (row["kernel"].removesuffix("_kernel"), tile, row["num_warps"] or 4, row["num_stages"] or "", kind)
        groups.setdefault(key, []).append(row)
    for (name, tile, warps, stages, kind), same in groups.items():
        most = {column: max(row[column] for row in same) for column in columns}
        numbers = f"{most['registers']} | {most['spill_bytes']} | {most['shared_bytes'] / 1024:.1f}"
        lines.append(f"| {name} | {tile} | {warps} | {stages} | {numbers} | {kind} |")
    return lines


def lines(words: Sequence[str]) -> list[str]:
    """What the command prints for these arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=int, default=90)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--markdown", action="store_true", help="a table and no JSON")
    parser.add_argument("--ungated", action="store_true")
    parser.add_argument("--biased", action="store_true")
    parser.add_argument("--tma", action="store_true")
    options = parser.parse_args(words)
    rows = kernels(
        options.target,
        options.dim,
        options.width,
        getattr(torch, options.dtype),
        options.tokens,
        gated=not options.ungated,
        biased=options.biased,
        tma=options.tma,
    )
    return markdown(rows) if options.markdown else [json.dumps(row) for row in rows]


if __name__ == "__main__":
    assert not os.environ.get("TRITON_INTERPRET"), "unset TRITON_INTERPRET"
    if sys.argv[1:] == ["--stdin"]:
        # Arguments on each line, answered by lines and an empty one: torch is imported once for all of them.
        for request in sys.stdin:
            sys.stdout.writelines(f"{line}\n" for line in [*lines(request.split()), ""])
            sys.stdout.flush()
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines(sys.argv[1:]))
