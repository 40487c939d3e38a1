"""Everything that needs a GPU, in parts of less than nine minutes each, every part with JSON of its own.

    python tests/benchmark_kernels.py test --out FOLDER      the tests marked gpu
    python tests/benchmark_kernels.py layers --out FOLDER    one layer, every peer but liger-kernel
    python tests/benchmark_kernels.py liger --out FOLDER     one layer against liger-kernel, which tunes for minutes
    python tests/benchmark_kernels.py model --out FOLDER     whole models: generation and a training step
    python tests/benchmark_kernels.py tune --out FOLDER      launches near the table's, for Llama-3-8B in 8 and in 64

`model` makes random models of about 1 B parameters, the same for every implementation. On a machine without a GPU
`--device cpu --size tiny` shows that it works. Files are written as it goes: a part that is killed keeps what it has.
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
from moeify.kernels.tune import Shape, tune

TESTS = Path(__file__).parent
# Nothing is begun after that; an implementation of a whole model may take two minutes more.
LIMIT_SECONDS = 480
MODEL_LIMIT_SECONDS = 400
REFERENCE = "grouped_mm"
# The dense model has no experts to implement.
DENSE = "dense"
# Steps before those that are timed.
WARM_UP = 2

# The attention of Llama 3.2 1B; an FFN of 8192 as 16 slices of 512, of which 8 are active.
SIZES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
}
SLICE = {"1b": 512, "tiny": 32}
PROMPT_TOKENS = {"1b": 128, "tiny": 8}
NEW_TOKENS = {"1b": 64, "tiny": 8}
BATCHES = {"1b": (1, 8), "tiny": (1,)}
TRAINING = {"1b": (4, 1024, 6), "tiny": (1, 16, 2)}


def configuration(model_type: str, size: str) -> Any:
    """16 slices of the FFN's width: 4 shared and 4 of 12 routed, 8 of 16 routed, or all of them dense."""
    width = SLICE[size]
    kinds: dict[str, dict[str, Any]] = {
        "llama": {"intermediate_size": 16 * width},
        "granitemoeshared": {
            "intermediate_size": width,
            "shared_intermediate_size": 4 * width,
            "num_local_experts": 12,
            "num_experts_per_tok": 4,
            "attention_multiplier": (SIZES[size]["hidden_size"] // SIZES[size]["num_attention_heads"]) ** -0.5,
        },
        "qwen3_moe": {
            "moe_intermediate_size": width,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "head_dim": SIZES[size]["hidden_size"] // SIZES[size]["num_attention_heads"],
        },
    }
    common = {**SIZES[size], "num_key_value_heads": SIZES[size]["num_attention_heads"] // 4}
    config = CONFIG_MAPPING[model_type](**common, **kinds[model_type], max_position_embeddings=4096)
    # No token ends a text early.
    config.eos_token_id = None
    return config


def build(model_type: str, size: str, implementation: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same random weights for every implementation.

    Drawn by a generator of their own: that of the device may be out of order after a graph that could not be captured.
    """
    if implementation == "moeify":
        from moeify.kernels import register

        register()
    options = {} if implementation == DENSE else {"experts_implementation": implementation}
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(configuration(model_type, size), dtype=dtype, **options)
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


def training_steps(model: Any, size: str) -> dict[str, Any]:
    """Whole steps with AdamW: losses, tokens a second, peak memory."""
    batch, context, steps = TRAINING[size]
    device = model.device
    generator = torch.Generator().manual_seed(1)
    ids_BC = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    losses = []

    def step() -> None:
        loss = model(input_ids=ids_BC, labels=ids_BC, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    first_use_seconds, _ = timed(step, device)
    for _ in range(WARM_UP - 1):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, _ = timed(lambda: [step() for _ in range(steps)], device)
    return {
        "losses": losses,
        "tokens_per_second": steps * ids_BC.numel() / seconds,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "first_use_seconds": first_use_seconds,
    }


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


def modes(size: str, implementation: str, ids_BC: Tensor) -> dict[str, Callable[[Any], dict[str, Any]]]:
    """Ways to generate. torch.compile costs a minute a model, so only the smallest batch has it.

    On a GPU transformers decodes with batched_mm where grouped_mm is chosen: compiling both would measure it twice.
    """
    count = NEW_TOKENS[size]
    found: dict[str, Callable[[Any], dict[str, Any]]] = {
        "generate": lambda model: generate(model, ids_BC, count),
        "graph" if ids_BC.is_cuda else "static cache": lambda model: generate_with_graph(model, ids_BC, count),
    }
    if ids_BC.is_cuda and len(ids_BC) == min(BATCHES[size]) and implementation != "batched_mm":
        # A static cache makes transformers compile the step with mode="reduce-overhead".
        found["compile"] = lambda model: generate(model, ids_BC, count, cache_implementation="static")
    return found


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
    def is_late(self) -> bool:
        return time.monotonic() - self.began > MODEL_LIMIT_SECONDS


def part_test(out: Path, device: torch.device) -> int:
    """The tests that need a GPU, in the files that have any."""
    files = sorted(str(path) for path in TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text())
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *files]
    report = Report("test", out, device)
    done = subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    sys.stdout.write(done.stdout + done.stderr)
    report.add(files=files, returncode=done.returncode, output=(done.stdout + done.stderr)[-20_000:])
    return done.returncode


def part_layers(out: Path, device: torch.device, *, part: str, size: str, peers: str) -> int:
    """One layer. liger-kernel tunes itself for every shape, so it has one shape and a part of its own."""
    chosen: dict[str, Any] = {}
    if part == "liger":
        chosen = {"cases": ("llama3-8b-8/2",), "tokens": (1, 32, 512, 8192), "routings": ("uniform",)}
    if size == "tiny":
        chosen |= {"cases": ("64x256-8/2",), "tokens": (1, 16)}
    others = "liger" if part == "liger" else "eager,batched_mm"
    options = LayerBenchOptions(
        **chosen,
        peers=tuple((peers or f"moeify,dense,grouped_mm,{others}").split(",")),
        device=str(device),
        seconds_per_row=0.02 if size == "tiny" else 0.2,
        limit_seconds=LIMIT_SECONDS,
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


def part_model(out: Path, device: torch.device, *, size: str, implementations: Sequence[str]) -> int:
    """Whole models, the reference implementation first, then the others and the dense model beside it."""
    dtype = dtype_by_name("auto", device)
    report = Report("model", out, device)
    for model_type in ("granitemoeshared", "qwen3_moe", "llama"):
        expected: dict[tuple[str, int], Any] = {}
        for implementation in [DENSE] if model_type == "llama" else implementations:
            if report.is_late:
                report.add(model=model_type, implementation=implementation, failure="no time left")
                continue
            row = {"model": model_type, "implementation": implementation}
            try:
                measure_model(report, row, size, device, dtype, expected)
            except Exception as error:
                report.add(**row, failure=first_line(error))
            release_memory()
    return 0


def measure_model(
    report: Report,
    row: dict[str, Any],
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    expected: dict[tuple[str, int], Any],
) -> None:
    """Generation in every mode, then training; what fails has a row that says why."""
    model = build(row["model"], size, row["implementation"], device, dtype)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    for batch in BATCHES[size]:
        generator = torch.Generator().manual_seed(batch)
        ids_BC = torch.randint(model.config.vocab_size, (batch, PROMPT_TOKENS[size]), generator=generator).to(device)
        logits_BV = last_logits(model, ids_BC)
        expected.setdefault(("logits", batch), logits_BV)
        reference_BV = expected["logits", batch]
        difference = float((logits_BV - reference_BV).norm() / reference_BV.norm())
        for mode, run in modes(size, row["implementation"], ids_BC).items():
            try:
                found = run(model)
            except Exception as error:
                report.add(**row, part="generate", mode=mode, batch=batch, failure=first_line(error))
                release_memory()
                continue
            wanted = expected.setdefault(("tokens", batch), found["tokens"])
            same = same_length(found["tokens"], wanted)
            report.add(
                **row, part="generate", mode=mode, batch=batch, logit_difference=difference, same_tokens=same, **found
            )
    report.add(**row, part="training", **training_steps(model, size))


def part_tune(out: Path, device: torch.device, *, size: str) -> int:
    """What launch.py's table should hold for this device, the most important number of tokens first."""
    report = Report("tune", out, device)
    tokens, shapes = (8192, 1, 512, 8, 32, 64), (Shape(4096, 1792, 8, 2), Shape(4096, 224, 64, 16))
    if size == "tiny":
        tokens, shapes = (1,), (Shape(32, 16, 4, 2, dtype=torch.float32),)
    # Without a device triton's own benchmark has nothing to measure with.
    clock = None if device.type == "cuda" else lambda call: timed(call, device)[0] * 1e6
    for number in tokens:
        for shape in shapes:
            for tuned in tune(shape, [number], device=device, time=clock):
                report.add(shape=str(shape), **asdict(tuned))
                if report.is_late:
                    report.add(failure="no time left")
                    return 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("part", choices=["test", "layers", "liger", "model", "tune"])
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--implementations", default=f"{REFERENCE},moeify,batched_mm", help="the reference first")
    parser.add_argument("--peers", default="", help="of layers and liger, instead of the part's own")
    asked = parser.parse_args(arguments)
    device = device_by_name(asked.device)
    if asked.part == "test":
        return part_test(asked.out, device)
    if asked.part == "model":
        return part_model(asked.out, device, size=asked.size, implementations=asked.implementations.split(","))
    if asked.part == "tune":
        return part_tune(asked.out, device, size=asked.size)
    return part_layers(asked.out, device, part=asked.part, size=asked.size, peers=asked.peers)


if __name__ == "__main__":
    sys.exit(main())
