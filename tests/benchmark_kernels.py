"""Everything that needs a GPU, in parts of less than eight minutes each, every part with JSON of its own.

    python tests/benchmark_kernels.py test --out FOLDER      the tests marked gpu, in groups side by side
    python tests/benchmark_kernels.py compile --out FOLDER   what `tune` tries, side by side: it then finds it compiled
    python tests/benchmark_kernels.py tune --out FOLDER      launches near the table's, for Llama-3-8B in 8 and in 64
    python tests/benchmark_kernels.py layers --out FOLDER    one layer, every peer but liger-kernel
    python tests/benchmark_kernels.py liger --out FOLDER     one layer against liger-kernel, which tunes for minutes
    python tests/benchmark_kernels.py model --out FOLDER     models of 8 B parameters: decode, prefill, memory

Models have random weights, the same for every implementation. On a machine without a GPU `--device cpu --size tiny`
shows that a part works. Files are written as it goes: a part that is killed keeps what it has.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeify.benchmark.layers.cases import cases
from moeify.benchmark.layers.run import layer_bench
from moeify.benchmark.layers.table import text
from moeify.benchmark.machine import device_by_name, dtype_by_name, machine_facts, versions
from moeify.benchmark.options import LayerBenchOptions
from moeify.benchmark.timing import first_line, release_memory
from moeify.kernels.launch import keep_tuned
from moeify.kernels.tune import Shape as LayerShape
from moeify.kernels.tune import compile_ahead, tune
from moeify.layout import resolve_layout

TESTS = Path(__file__).parent
# Nothing is begun after that; an implementation of a whole model may take two minutes more.
LIMIT_SECONDS = 480
MODEL_LIMIT_SECONDS = 400
REFERENCE = "grouped_mm"
# The dense model has no experts to implement.
DENSE = "dense"
# Steps before those that are timed.
WARM_UP = 2

# As published, and tiny ones; the FFN's width last.
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "8b": {
        "llama": {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256, "intermediate_size": 14336},
        "qwen3": {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936, "intermediate_size": 12288},
    },
    "tiny": {
        "llama": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 512},
        "qwen3": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 512},
    },
}
HEAD_DIM = {"8b": 128, "tiny": 16}
# Slices of the FFN that `moeify split` makes of these widths unless it is told otherwise.
SLICES = {14336: 28, 12288: 24, 512: 8}
MOE = {"llama": "granitemoeshared", "qwen3": "glm4_moe"}
PROMPT_TOKENS = {"8b": 128, "tiny": 8}
PREFILL_TOKENS = {"8b": 2048, "tiny": 32}
NEW_TOKENS = {"8b": 32, "tiny": 4}
BATCHES = {"8b": (1, 8, 64), "tiny": (1, 2)}
# What is measured of each family, the most important first: implementation and active share; a static model is dense.
ROWS = [
    *[(DENSE, 1.0), (DENSE, 0.5), (REFERENCE, 0.5), ("moeify", 0.5), (REFERENCE, 0.75), ("moeify", 0.75)],
    *[(DENSE, 0.75), ("batched_mm", 0.5)],
]


def configuration(family: str, size: str, implementation: str, share: float) -> Any:
    """The dense model, what static pruning leaves of it, or a split in the layout that moeify gives it."""
    sizes = dict(SHAPES[size][family])
    width = sizes["intermediate_size"]
    slices = SLICES[width]
    active = round(share * slices)
    heads = sizes["hidden_size"] // HEAD_DIM[size]
    common = {
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": HEAD_DIM[size],
        "max_position_embeddings": 4096,
    }
    model_type = family
    if implementation == DENSE:
        common["intermediate_size"] = width // slices * active
    else:
        model_type, shared = MOE[family], resolve_layout(slices, None, active, holds_shared=True).num_shared
        common |= {
            "intermediate_size": width // slices,
            "num_experts_per_tok": active - shared,
            # granitemoeshared
            "shared_intermediate_size": width // slices * shared,
            "num_local_experts": slices - shared,
            "attention_multiplier": HEAD_DIM[size] ** -0.5,
            # glm4_moe
            "moe_intermediate_size": width // slices,
            "n_shared_experts": shared,
            "n_routed_experts": slices - shared,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "use_qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0},
        }
    config = CONFIG_MAPPING[model_type](**common)
    # No token ends a text early.
    config.eos_token_id = None
    return config


def build(family: str, size: str, implementation: str, share: float, device: torch.device, dtype: torch.dtype) -> Any:
    """The same random weights for every implementation.

    Drawn by a generator of their own: that of the device may be out of order after a graph that could not be captured.
    """
    if implementation == "moeify":
        from moeify.kernels import register

        register()
    options = {} if implementation == DENSE else {"experts_implementation": implementation}
    with torch.device(device), no_init_weights():
        config = configuration(family, size, implementation, share)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model.eval()


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds by the host's clock until the device has done everything, and what the call returned."""
    wait(device)
    began = time.perf_counter()
    found = call()
    wait(device)
    return time.perf_counter() - began, found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def generate(model: Any, ids_BC: Tensor, new_tokens: int, **options: Any) -> dict[str, Any]:
    """Milliseconds a step of transformers' own generate, prompt left out, and the tokens."""

    def run(count: int) -> Tensor:
        tokens: Tensor = model.generate(
            ids_BC,
            attention_mask=torch.ones_like(ids_BC),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return tokens[:, ids_BC.shape[1] :]

    first_use_seconds, _ = timed(lambda: run(2), ids_BC.device)
    run(new_tokens)
    short, _ = timed(lambda: run(2), ids_BC.device)
    long, tokens = timed(lambda: run(new_tokens), ids_BC.device)
    return {
        "ms_per_step": (long - short) / (new_tokens - 2) * 1e3,
        "first_use_seconds": first_use_seconds,
        "tokens": tokens.tolist(),
    }


@torch.no_grad()
def generate_with_graph(model: Any, ids_BC: Tensor, new_tokens: int) -> dict[str, Any]:
    """The same with one CUDA graph of a step over a static cache: what a serving engine does."""
    cache = StaticCache(config=model.config, max_cache_len=ids_BC.shape[1] + 2 * new_tokens + WARM_UP)
    logits_BCV = model(ids_BC, past_key_values=cache, use_cache=True).logits
    token_B1 = logits_BCV[:, -1:].argmax(dim=-1)
    tokens = [token_B1.clone()]

    def step() -> None:
        token_B1.copy_(model(token_B1, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1))

    step_once = _captured(step, tokens, token_B1) if ids_BC.is_cuda else step
    while len(tokens) < new_tokens:
        step_once()
        tokens.append(token_B1.clone())
    seconds, _ = timed(lambda: [step_once() for _ in range(new_tokens)], ids_BC.device)
    return {"ms_per_step": seconds / new_tokens * 1e3, "tokens": torch.cat(tokens, dim=1).tolist()}


def _captured(step: Callable[[], None], tokens: list[Tensor], token_B1: Tensor) -> Callable[[], None]:
    """One step as a graph; the steps of the warm-up count, those of the capture do not run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
            tokens.append(token_B1.clone())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def prefill(model: Any, ids_BC: Tensor) -> float:
    """Milliseconds of one forward pass over the prompt, cache included; the median of five."""
    seconds = [timed(lambda: model(ids_BC, use_cache=True, logits_to_keep=1), ids_BC.device)[0] for _ in range(7)]
    return sorted(seconds[2:])[2] * 1e3


def same_length(tokens: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    """How many tokens are the same in every row, counted from the first.

    Random weights give logits that nearly tie, so that rounding alone can part two texts; `logit_difference` tells.
    """
    for length, (found, wanted) in enumerate(zip(zip(*tokens, strict=True), zip(*expected, strict=True), strict=True)):
        if found != wanted:
            return length
    return len(expected[0])


@torch.no_grad()
def last_logits(model: Any, ids_BC: Tensor) -> Tensor:
    return model(ids_BC, use_cache=False).logits[:, -1].double().cpu()


class Report:
    """What a part found, on disk after every row."""

    def __init__(self, part: str, out: Path, device: torch.device) -> None:
        self.path = out / f"{part}.json"
        packages = versions(["torch", "triton", "transformers", "liger-kernel"])
        self.values: dict[str, Any] = {
            "schema": "moeify.kernel-benchmark/1",
            "part": part,
            "machine": machine_facts(device),
            "versions": packages,
            "command": sys.argv,
            "rows": [],
        }
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> None:
        self.values["rows"].append(row)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.values, indent=1))
        temporary.replace(self.path)
        shown = {key: value for key, value in row.items() if key != "tokens"}
        sys.stdout.write(f"{time.monotonic() - self.began:6.0f} s  {json.dumps(shown)}\n")
        sys.stdout.flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


# Groups of tests that take about as long; the scheduler of conftest.py would give a file's tests to one process.
GROUPS = {
    "bfloat16": ("kernels/test_kernels_gpu.py", "rounded and bfloat16"),
    "float16": ("kernels/test_kernels_gpu.py", "rounded and not bfloat16"),
    "bits": ("kernels/test_kernels_gpu.py", "same_bits"),
    "offsets": ("kernels/test_kernels_gpu.py", "offsets"),
    "others": ("kernels/test_kernels_gpu.py", "not rounded and not same_bits and not offsets"),
    "layers": ("benchmark/test_layer_bench.py", "gpu"),
    "commands": ("cli/test_cli_gpu.py", "not train and not bench"),
    "training": ("cli/test_cli_gpu.py", "train or bench"),
}


def part_test(out: Path, device: torch.device, *, limit_seconds: float) -> int:
    """The tests that need a GPU, every group in a process of its own, all at once: they check values, not times."""
    report = Report("test", out, device)
    running = {}
    for group, (file, expression) in GROUPS.items():
        words = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", expression, "-p", "no:cacheprovider", "--tb=short"]
        # What other versions of a library warn of is not tested here.
        words += ["-W", "default", "--durations=5", "-q", str(TESTS / file)]
        with (out / f"test-{group}.log").open("w") as log:
            running[group] = subprocess.Popen(words, cwd=TESTS.parent, stdout=log, stderr=subprocess.STDOUT)
    failed = 0
    for group, process in running.items():
        try:
            code = process.wait(timeout=max(1.0, limit_seconds - report.seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        log_file = out / f"test-{group}.log"
        output = log_file.read_text()
        log_file.unlink()
        sys.stdout.write("\n".join(output.splitlines()[-25:]) + "\n")
        report.add(group=group, returncode=code, output=output[-40_000:])
        failed += code != 0
    return int(failed > 0)


def part_layers(
    out: Path, device: torch.device, *, part: str, size: str, chosen: dict[str, Any], seconds: float
) -> int:
    """One layer. liger-kernel tunes itself for every shape, so it has one shape and a part of its own."""
    usual: dict[str, Any] = {"peers": ("moeify", "dense", REFERENCE, "eager", "batched_mm")}
    if part == "liger":
        usual = {"cases": ("llama3-8b-8/2",), "tokens": (1, 32, 512, 8192), "routings": ("uniform",)}
        usual["peers"] = ("moeify", "dense", REFERENCE, "liger")
    if size == "tiny":
        usual |= {"cases": ("64x256-8/2",), "tokens": (1, 16)}
    options = LayerBenchOptions(
        **{**usual, **chosen},
        device=str(device),
        seconds_per_row=0.02 if size == "tiny" else 0.1,
        limit_seconds=seconds,
    )
    result = layer_bench(
        cases(options),
        options,
        out=out / f"{part}.json",
        overwrite=True,
        command=shlex.join(["python", *sys.argv]),
    )
    sys.stdout.write(text(result) + "\n")
    return 0


def part_model(out: Path, device: torch.device, *, size: str, families: Sequence[str]) -> int:
    """Whole models: dense, static and split ones, each family's by importance."""
    report = Report("model", out, device)
    for family in families:
        expected: dict[tuple[float, int], Any] = {}
        for implementation, share in ROWS:
            row = {"family": family, "implementation": implementation, "active_share": share}
            if report.seconds > MODEL_LIMIT_SECONDS:
                report.add(**row, failure="no time left")
                continue
            try:
                measure_model(report, row, size, device, expected)
            except Exception as error:
                report.add(**row, failure=first_line(error))
            release_memory()
    return 0


def measure_model(
    report: Report, row: dict[str, Any], size: str, device: torch.device, expected: dict[tuple[float, int], Any]
) -> None:
    """Prefill and decode, the reference implementation's tokens first; a mode that fails has a row that says why."""
    began = time.perf_counter()
    dtype, split = dtype_by_name("auto", device), row["implementation"] != DENSE
    model = build(row["family"], size, row["implementation"], row["active_share"], device, dtype)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["weight_bytes"] = sum(parameter.nbytes for parameter in model.parameters())

    def draw(batch: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(device)

    report.add(**row, part="prefill", tokens=PREFILL_TOKENS[size], ms=prefill(model, draw(1, PREFILL_TOKENS[size])))
    for batch in BATCHES[size]:
        ids_BC = draw(batch, PROMPT_TOKENS[size])
        modes = {"graph": generate_with_graph} if batch > 1 else {"graph": generate_with_graph, "generate": generate}
        for mode, run in modes.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            try:
                found = run(model, ids_BC, NEW_TOKENS[size])
            except Exception as error:
                report.add(**row, part="decode", mode=mode, batch=batch, failure=first_line(error))
                release_memory()
                continue
            if device.type == "cuda":
                found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
            if split:
                logits_BV = last_logits(model, ids_BC)
                first = expected.setdefault((row["active_share"], batch), (found["tokens"], logits_BV))
                found["same_tokens"] = same_length(found["tokens"], first[0])
                found["logit_difference"] = float((logits_BV - first[1]).norm() / first[1].norm())
            report.add(**row, part="decode", mode=mode, batch=batch, **found)
    report.add(**row, part="seconds", seconds=time.perf_counter() - began)


# The kernels of Llama-3-8B's layers in 8 and in 64, the most important number of tokens first.
TUNED_TOKENS = {"8b": (8192, 1, 8, 128, 32, 64), "tiny": (1,)}
TUNED_SHAPES = {
    "8b": (LayerShape(4096, 1792, 8, 2), LayerShape(4096, 224, 64, 16)),
    "tiny": (LayerShape(32, 16, 4, 2, dtype=torch.float32),),
}


def part_compile(device: torch.device, *, size: str, tokens: Sequence[int], processes: int) -> int:
    for shape in TUNED_SHAPES[size]:
        began = time.monotonic()
        compile_ahead(shape, tokens or TUNED_TOKENS[size], device=device, processes=processes)
        sys.stdout.write(f"{time.monotonic() - began:6.0f} s  {shape}\n")
        sys.stdout.flush()
    return 0


def part_tune(out: Path, device: torch.device, *, size: str, tokens: Sequence[int]) -> int:
    """What launch.py's table should hold for this device; later parts with the same cache use the first shape's."""
    report, kept = Report("tune", out, device), set[str]()
    # Without a device triton's own benchmark has nothing to measure with.
    clock = None if device.type == "cuda" else lambda call: timed(call, device)[0] * 1e6
    for number in tokens or TUNED_TOKENS[size]:
        for shape in TUNED_SHAPES[size]:
            for tuned in tune(shape, [number], device=device, backward=number == max(TUNED_TOKENS[size]), time=clock):
                report.add(shape=str(shape), **asdict(tuned))
                if tuned.key not in kept:
                    keep_tuned(device, {tuned.key: tuned.launch})
                kept.add(tuned.key)
                if report.seconds > LIMIT_SECONDS:
                    report.add(failure="no time left")
                    return 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("part", choices=["test", "compile", "tune", "layers", "liger", "model"])
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=list(SHAPES), default="8b")
    parser.add_argument("--families", default="llama,qwen3", help="of model")
    parser.add_argument("--processes", type=int, default=8, help="of compile")
    parser.add_argument("--seconds", type=float, default=LIMIT_SECONDS, help="of test, layers and liger")
    parser.add_argument("--cases", default="", help="of layers, instead of all")
    parser.add_argument("--tokens", default="", help="of compile, tune and layers, instead of all")
    parser.add_argument("--routings", default="", help="of layers, instead of both")
    parser.add_argument("--passes", default="", help="of layers, instead of both")
    parser.add_argument("--peers", default="", help="of layers and liger, instead of the part's own")
    asked = parser.parse_args(arguments)
    device = device_by_name(asked.device)
    tokens = tuple(map(int, asked.tokens.split(","))) if asked.tokens else ()
    if asked.part == "test":
        return part_test(asked.out, device, limit_seconds=asked.seconds)
    if asked.part == "model":
        return part_model(asked.out, device, size=asked.size, families=asked.families.split(","))
    if asked.part == "compile":
        return part_compile(device, size=asked.size, tokens=tokens, processes=asked.processes)
    if asked.part == "tune":
        return part_tune(asked.out, device, size=asked.size, tokens=tokens)
    chosen: dict[str, Any] = {
        name: tuple(text.split(","))
        for name in ("cases", "routings", "passes", "peers")
        if (text := getattr(asked, name))
    }
    if tokens:
        chosen["tokens"] = tokens
    return part_layers(asked.out, device, part=asked.part, size=asked.size, chosen=chosen, seconds=asked.seconds)


if __name__ == "__main__":
    sys.exit(main())
