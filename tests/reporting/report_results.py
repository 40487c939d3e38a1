"""Results of a benchmark that nobody measured, made up with the shape and roughly the numbers of SmolLM2-135M."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeify.benchmark.ceilings import Ceilings
from moeify.benchmark.engines.results import EngineFile, EngineSpeed
from moeify.benchmark.models.results import (
    ALL_TEXTS,
    Interval,
    Kind,
    LayerExperts,
    Model,
    ModelBench,
    Outcome,
    Part,
    Phase,
    Quality,
    Sample,
    Speed,
    Verdict,
)
from moeify.check.compare import Comparison, Row
from moeify.check.loops import LoopResult
from moeify.check.perplexity import EvalResult
from moeify.convert.search import Point, SearchResult
from moeify.layout import Layout
from moeify.recipes.limits import Limit
from moeify.recipes.run import RunResult
from moeify.reporting.facts import Facts, facts_of
from moeify.reporting.reader import Record
from moeify.results import to_json
from moeify.training.finetune import FinetuneHistory, StageHistory

MILLION = 1_000_000
LOOPS = (
    LoopResult("smollm2-135m.gguf", 16, 2700, 256, 3, 7, 0.29),
    LoopResult("run/moe", 16, 3600, 256, 9, 12, 0.52),
)
WORDS = [
    " the",
    " of",
    ",",
    "\n",
    " and",
    " whale",
    " sea",
    "s",
    "ing",
    " Pequod",
    ".",
    "'t",
    " sub",
    "_",
    "{",
    "()",
    "\t",
]


def part(parameters: float, active: float | None = None) -> Part:
    """A part of so many millions; a token uses all of it unless said otherwise."""
    active = parameters if active is None else active
    sizes = [round(value * MILLION) for value in (parameters, active)]
    return Part(sizes[0], sizes[1], 2 * sizes[1], 4 * sizes[1])


def model(name: str, kind: Kind, active_share: float = 1.0, stored_share: float = 1.0, **changes: Any) -> Model:
    parts = {
        "embedding": part(28.3, 0.0),
        "attention": part(26.5),
        "ffn": part(79.6 * stored_share, 79.6 * active_share),
        "norm": part(0.035),
        "head": part(0.0, 28.3),
    }
    if kind == "moe":
        parts["router"] = part(0.5)
    bytes_on_disk = 4 * sum(one.parameters for one in parts.values())
    experts = (32, 4, 16) if kind == "moe" else (None, None, None)
    found = Model(
        name=name,
        path="smollm2-135m.gguf" if kind == "dense" else f"runs/smollm2/{name}",
        kind=kind,
        model_type="granitemoeshared" if kind == "moe" else "llama",
        num_layers=30,
        num_experts=experts[0],
        num_shared=experts[1],
        num_active=experts[2],
        active_share=active_share,
        parts=parts,
        bytes_on_disk=bytes_on_disk,
        load_peak_memory_bytes=bytes_on_disk + 400 * MILLION,
        peak_memory_bytes=bytes_on_disk + 650 * MILLION,
    )
    return dataclasses.replace(found, **changes)


def over(ratio: float, spread: float = 0.01) -> Interval:
    """An interval of `spread` in logarithms."""
    return Interval(ratio, ratio * math.exp(-spread), ratio * math.exp(spread))


def quality(
    name: str, perplexity: float, dense: float = 49.6, data: str = "moby-dick", spread: float = 0.02, **static: Interval
) -> Quality:
    """Intervals of `spread` in logarithms; without any for the dense model's ratio to itself."""
    own = name == "dense"
    ratio, wide = perplexity / dense, 0.0 if own else spread
    kl = math.log(ratio) * 0.9 if ratio > 1 else 0.0
    return Quality(
        model=name,
        data=data,
        num_tokens=10_240,
        perplexity=perplexity,
        perplexity_low=perplexity * math.exp(-0.05),
        perplexity_high=perplexity * math.exp(0.05),
        ratio=ratio,
        ratio_low=ratio * math.exp(-wide),
        ratio_high=ratio * math.exp(wide),
        kl_nats=kl,
        kl_low=kl * 0.97,
        kl_high=kl * 1.03,
        top1_agreement=math.exp(-kl),
        over_static=static,
    )


def speed(name: str, phase: Phase, batch: int, prompt: int, speed_over_dense: float, implementation: str) -> Speed:
    dense_ms = (14.0 + 0.9 * batch) if phase == "decode" else 0.9 * batch * prompt
    ms, tokens = dense_ms / speed_over_dense, batch * (prompt if phase == "prefill" else 1)
    own = name == "dense"
    return Speed(
        model=name,
        implementation=implementation,
        phase=phase,
        batch=batch,
        prompt_tokens=prompt,
        ms_p10=ms * 0.97,
        ms_p50=ms,
        ms_p90=ms * 1.06,
        num_samples=40,
        tokens_per_second=tokens / ms * 1000,
        time_over_dense=None if own else 1 / speed_over_dense,
        time_over_dense_low=None if own else 0.98 / speed_over_dense,
        time_over_dense_high=None if own else 1.02 / speed_over_dense,
        experts_hit=min(1.0, 0.43 * batch**0.3) if implementation != "dense" else None,
        bytes_read=400 * MILLION,
        flops=2 * 106 * MILLION * tokens,
        floor_ms=ms * 0.7,
        time_over_floor=1 / 0.7,
    )


def verdict(name: str, phase: Phase, batch: int, prompt: int, speed_over_dense: float) -> Verdict:
    outcome: Outcome = "same" if abs(speed_over_dense - 1) < 0.02 else "faster" if speed_over_dense > 1 else "slower"
    if name.startswith("static"):
        return Verdict(name, "dense", phase, batch, prompt, outcome, 1 / speed_over_dense, "half the FFN is gone")
    why = f"the batch hit {min(1.0, 0.43 * batch**0.3):.0%} of the experts"
    return Verdict(name, "grouped_mm", phase, batch, prompt, outcome, 1 / speed_over_dense, why)


def experts(num_layers: int, num_experts: int, tokens: Sequence[str] = WORDS) -> list[LayerExperts]:
    """Seeded numbers: uneven loads, a few pairs that like each other, a router that is better further up."""
    random = np.random.default_rng(0)
    found = []
    for layer in range(num_layers):
        load = random.dirichlet(np.full(num_experts, 6.0))
        excess = random.normal(0.0, 0.25, (num_experts, num_experts))
        symmetric = np.maximum((excess + excess.T) / 2 + (random.random((num_experts, 1)) > 0.93), -1.0)
        symmetric = np.minimum(symmetric, symmetric.T)
        np.fill_diagonal(symmetric, 0.0)
        chance = 0.45 + 0.1 * float(random.random())
        found.append(
            LayerExperts(
                layer=layer,
                load=tuple(load.tolist()),
                coactivation=tuple(tuple(row) for row in symmetric.tolist()),
                oracle_capture=min(0.99, 0.78 + 0.006 * layer + 0.05 * float(random.random())),
                random_capture=chance,
                top_tokens=tuple(tuple(random.choice(tokens, 8, replace=False).tolist()) for _ in range(num_experts)),
                texts={text: tuple(random.dirichlet(load * 99).tolist()) for text in ("moby-dick", "of-the-union")},
            )
        )
    return found


PHASES: tuple[Phase, Phase] = ("decode", "prefill")
DECODE = {1: 1.24, 4: 1.09, 16: 1.0, 64: 0.81}
PREFILL = {1: 0.72, 4: 0.55}


def smollm2(num_layers: int = 30, num_experts: int = 32, tokens: Sequence[str] = WORDS) -> ModelBench:
    """Dense, a mixture of experts at half the FFN, and the static control of its size."""
    texts = {"moby-dick": 1.0, "state-of-the-union": 0.8, ALL_TEXTS: math.sqrt(0.8)}
    perplexities = {"dense": 49.6, "moe-50": 108.9, "static-50": 146.6}
    bench = ModelBench(
        date="2026-11-22T10:00:00+00:00",
        command="moeify bench runs/smollm2/moe-50 runs/smollm2/static-50 --against smollm2-135m.gguf -o runs/smollm2",
        machine={"device": "cpu", "processor": "made up", "threads": 2, "triton_interpreter": False},
        versions={"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "moeify": "0.1.0", "liger": None},
        dtype="float32",
        context=512,
        models=[model("dense", "dense"), model("moe-50", "moe", 0.5), model("static-50", "static", 0.5, 0.5)],
        quality=[
            dataclasses.replace(
                quality(name, value * scale, 49.6 * scale, data),
                over_static={"static-50": over(108.9 / 146.6)} if name == "moe-50" else {},
            )
            for name, value in perplexities.items()
            for data, scale in texts.items()
        ],
        ceilings=Ceilings(1.2e10, 1.5e11, 1024, "float32"),
    )
    for phase, prompt, speeds in (("decode", 512, DECODE), ("prefill", 512, PREFILL)):
        for batch, times in speeds.items():
            bench.speed.append(speed("dense", phase, batch, prompt, 1.0, "dense"))
            bench.speed.append(speed("static-50", phase, batch, prompt, 1.45, "dense"))
            bench.speed.append(speed("moe-50", phase, batch, prompt, times, "grouped_mm"))
            bench.speed.append(speed("moe-50", phase, batch, prompt, times * 0.6, "eager"))
            bench.verdicts.append(verdict("moe-50", phase, batch, prompt, times))
            bench.verdicts.append(verdict("static-50", phase, batch, prompt, 1.45))
    reason = "needs a CUDA device"
    bench.speed.append(Speed("moe-50", "moeify", "decode", 1, 512, reason=reason))
    bench.experts["moe-50"] = experts(num_layers, num_experts, tokens)
    bench.samples = [Sample("moby-dick", "Call me", {name: f" a {name}, <says> it.\n" for name in perplexities})]
    return bench


def engine_speed(
    name: str, phase: Phase, time: float | None, spread: float = 0.02, num_tokens: int = 64, threads: int = 1
) -> EngineSpeed:
    """One row of llama.cpp; no time over dense for the dense model itself."""
    ends = (None, None) if time is None else (time * (1 - spread), time * (1 + spread))
    return EngineSpeed(name, "llama.cpp", "q8_0", threads, phase, num_tokens, 5.0, 200.0, time, *ends, 3)


def in_llama_cpp(bench: ModelBench, decode: float, prefill: float) -> ModelBench:
    """The benchmark with files of the dense model, the mixture and the control in llama.cpp."""
    names = [model.name for model in bench.models]
    files = [EngineFile(name, "llama.cpp", "q8_0", 150_000_000, 50.0, 1.0, 1.0) for name in names]
    rows = [
        *(engine_speed(names[0], phase, None) for phase in PHASES),
        *(engine_speed(names[1], phase, time) for phase, time in zip(PHASES, (decode, prefill), strict=True)),
        *(engine_speed(names[2], phase, time) for phase, time in zip(PHASES, (0.71, 0.67), strict=True)),
    ]
    return dataclasses.replace(bench, engine_files=files, engine_speed=rows)


def write(folder: Path, bench: ModelBench, name: str = "bench.json", **changes: Any) -> Path:
    """Store a result as `moeify bench` does."""
    return write_json(folder / name, to_json(bench) | changes)


def write_json(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, allow_nan=False))
    return path


def row(method: str, budget: float, perplexity: float) -> Row:
    return Row(method, budget, perplexity, perplexity, perplexity, 1.0, 1.0, 1.0, 0.0, {}, {})


def write_others(folder: Path) -> None:
    """What other commands leave in a run's folder."""
    rows = [("dense", 1.0, 36.0), ("CMoE", 0.5, 98.0), ("random", 0.5, 1990.0), ("moeify 32 experts", 0.5, 70.0)]
    greedy = [
        Point("greedy", share, round((54.8 + share * 79.6) * MILLION), Layout(32, 4, 16, (0,)), 0.1, 0.1, perplexity)
        for share, perplexity in ((0.75, 44.0), (0.5, 60.0), (0.4, 80.0))
    ]
    uniform = dataclasses.replace(greedy[1], strategy="uniform", perplexity=66.0)
    job = {
        "model": "feed" * 16,
        "target": "granitemoeshared",
        "dtype": "torch.float32",
        "calibration": {"source": "builtin", "num_tokens": 16384, "sha256": "abc123"},
        "options": {"experts": 32, "active": 16, "refit": False, "seed": 0},
        "versions": {"moeify": "0.1.0"},
    }
    evals = [{"eval_perplexity": 108.9 - 3 * step, "step": step, "epoch": 0.1} for step in range(5)]
    steps = [{"loss": 1.0, "step": step} for step in range(5)]
    stage = StageHistory("full", {"perplexity": 108.9}, {"perplexity": 96.9}, 4096, (*steps, *evals))
    control = StageHistory("full", {"perplexity": 146.6}, {"perplexity": 130.0}, 4096, (*steps, *evals))
    evaluated = {"smollm2-135m.gguf": 50.0, "run/moe": 107.0, "run/kmeans": 120.0, "run/random": 190.0}
    evaluations = [EvalResult(name, "moby-dick", value, 10_239, 9.0, "") for name, value in evaluated.items()]
    limit = Limit("perplexity under static on text", "109", "< 100", passed=False)
    results = {
        "compare.json": Comparison("smollm2-135m.gguf", tuple(row(*values) for values in rows), {}, {}),
        "search.json": SearchResult("smollm2-135m.gguf", 0.5, greedy[1], uniform, tuple(greedy), 40.0, {}),
        "run.json": RunResult(folder, (), None, tuple(evaluations), (limit,), loops=LOOPS),
        "moe-50/moeify.json": Record(job, 1, 1),
        "moe-50-finetuned/finetune.json": FinetuneHistory((stage,)),
        "static-50-finetuned/finetune.json": FinetuneHistory((control,)),
    }
    for name, value in results.items():
        write_json(folder / name, to_json(value))


def bench(
    *,
    moe: float | None = 60.0,
    static: float | None = 80.0,
    speeds: Mapping[tuple[Phase, int], float] | None = None,
    static_speed: float = 1.3,
    spread: float = 0.02,
    paired: float | None = 0.01,
    moe_changes: Mapping[str, Any] | None = None,
) -> ModelBench:
    """A dense model of perplexity 50, a mixture of experts and a static control with these perplexities and speeds."""
    speeds = {("decode", 1): 1.2, ("decode", 8): 1.1, ("prefill", 1): 1.1} if speeds is None else speeds
    found = dataclasses.replace(smollm2(2, 4), models=[], quality=[], samples=[], speed=[], verdicts=[], experts={})
    found.models = [model("dense", "dense"), model("moe", "moe", 0.5, **(moe_changes or {}))]
    found.quality = [quality("dense", 50.0, 50.0)]
    if moe is not None:
        pair = {"static": over(moe / static, paired)} if static is not None and paired is not None else {}
        found.quality.append(quality("moe", moe, 50.0, spread=spread, **pair))
    if static is not None:
        found.models.append(model("static", "static", 0.5, 0.5))
        found.quality.append(quality("static", static, 50.0, spread=spread))
        found.verdicts += [verdict("static", phase, batch, 512, static_speed) for phase, batch in speeds]
    found.verdicts += [verdict("moe", phase, batch, 512, times) for (phase, batch), times in speeds.items()]
    return found


def facts(**changes: Any) -> Facts:
    """About the mixture of `bench`."""
    found = bench(**changes)
    return facts_of(found, found.models[1])
