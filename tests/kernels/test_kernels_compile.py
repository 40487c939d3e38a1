"""The kernels compiled ahead of time for GPUs that need not be there: nothing spills, all fits, operands stream."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from torch import cuda

from moeify import kernels

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
Rows = list[dict[str, Any]]


class Compiler:
    """A process that compiles: the interpreter changes what @triton.jit returns, so it cannot be this one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def lines(self, *arguments: str) -> list[str]:
        """What the command prints for these arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*arguments, file=self._process.stdin, flush=True)
        answer = []
        while (line := self._process.stdout.readline()) != "\n":
            assert line, self._process.communicate()[1]
            answer.append(line.rstrip("\n"))
        return answer

    def rows(self, *arguments: str) -> Rows:
        return [json.loads(line) for line in self.lines(*arguments)]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    """It has compiled nothing yet, not even in an earlier session: what is asked for twice comes from its cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("kernel_compiler.py")), "--stdin"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        yield Compiler(process)
        process.communicate()


@pytest.fixture(scope="module")
def wide(compiler: Compiler) -> Rows:
    """An expert of Llama-3-8B in 8, the first that is compiled."""
    return compiler.rows()


@pytest.fixture(scope="module", params=["wide", "narrow", "bulk copies", "biased"])
def hopper(request: pytest.FixtureRequest, compiler: Compiler, wide: Rows) -> Rows:
    """An expert of Llama-3-8B in 8, in 64, with weights through the copy engine, and with biases for a gate."""
    options = {"narrow": ["--width", "224"], "bulk copies": ["--tma"], "biased": ["--ungated", "--biased"]}
    return wide if request.param == "wide" else compiler.rows(*options[request.param])


def products(rows: Rows) -> Rows:
    """Those of matrices with matrices; one token has none."""
    return [row for row in rows if "INNER" in row and "ROWS" in row]


def test_no_register_is_spilled(hopper: Rows) -> None:
    assert [row for row in hopper if row["spill_bytes"]] == []


def test_shared_memory_suffices(hopper: Rows) -> None:
    assert [row for row in hopper if row["shared_bytes"] > SHARED_BYTES[90]] == []


def test_tall_tiles_use_the_matrix_instructions_of_hopper(hopper: Rows) -> None:
    tall = [row for row in products(hopper) if row["ROWS"] >= 64]
    assert len(tall) >= 10
    assert [row for row in tall if not row["wgmma"]] == []
    assert [row for row in products(hopper) if not row["wgmma"] and not row["mma"]] == []


def test_operands_stay_in_flight(hopper: Rows) -> None:
    """Shared memory holds what the stages ask for: less means that the compiler gave up on streaming an operand.

    Where rows are looked up inside the loop, one stage goes to the look-up; a loop of a few steps needs fewer stages.
    """
    for row in products(hopper):
        weights = 2 if row.get("GATED") and "up" in row["kernel"] else 1
        block = 2 * row["INNER"] * (row["ROWS"] + weights * row["COLS"])
        assert row["shared_bytes"] >= (row["num_stages"] - 1) * block, row


def test_operands_come_sixteen_bytes_at_a_time(hopper: Rows) -> None:
    """Where weight gradients look rows up, the look-up itself has four."""
    for row in products(hopper):
        assert row["copy_bytes"] == [16] or (row["kernel"], row["copy_bytes"]) == ("weight_grad_kernel", [4, 16]), row


def test_weights_come_through_the_copy_engine_where_asked(hopper: Rows, request: pytest.FixtureRequest) -> None:
    """The table asks for it where experts are narrow."""
    tall = [row for row in hopper if row["kernel"] in ("up_kernel", "expert_matmul_kernel") and row["ROWS"] == 128]
    asked = {"bulk copies": {True}, "narrow": {True, False}}.get(request.node.callspec.params["hopper"], {False})
    assert {row["bulk_copies"] > 0 for row in tall} == asked


@pytest.mark.parametrize(("target", "dtype"), [(80, "bfloat16"), (90, "float32"), (100, "bfloat16")])
def test_other_devices_and_dtypes_compile(target: int, dtype: str, compiler: Compiler, wide: Rows) -> None:
    options = ["--target", str(target), "--dtype", dtype, "--width", "448", "--tokens", "1", "33", "8192"]
    rows = compiler.rows(*options)
    kernels = {"single_up_kernel", "decode_up_kernel", "up_kernel", "expert_matmul_kernel", "weight_grad_kernel"}
    assert kernels < {row["kernel"] for row in rows}
    assert max(row["shared_bytes"] for row in rows) <= SHARED_BYTES[target]


def test_rows_of_no_16_bytes_stream_as_well(compiler: Compiler) -> None:
    """Llama-2-7B in 64: 172 neurons are 344 bytes, of which 8 come at a time."""
    rows = compiler.rows("--dtype", "float16", "--width", "172", "--tokens", "1", "33", "8192")
    assert [row for row in rows if row["spill_bytes"] or row["shared_bytes"] > SHARED_BYTES[90]] == []
    copies = [row["copy_bytes"] for row in products(rows)]
    assert all(copies)
    assert any(8 in sizes for sizes in copies)


@pytest.mark.skipif(cuda.is_available(), reason="the device itself is tested")
def test_the_first_use_is_a_matter_of_seconds(wide: Rows) -> None:
    """The kernels of all roads, compiled one after the other; a coarse limit against unrolled loops (16 s for one)."""
    slowest = max(wide, key=lambda row: row["seconds"])
    assert 0.1 < slowest["seconds"] < 10, slowest


@pytest.mark.skipif(triton.__version__ != "3.9.0", reason="the table is that of triton 3.9.0")
def test_the_table_of_the_readme_is_what_compiles(compiler: Compiler, wide: Rows) -> None:
    readme = Path(kernels.__file__).with_name("README.md").read_text()
    assert readme.split("--markdown -->\n")[1].splitlines() == compiler.lines("--markdown")
