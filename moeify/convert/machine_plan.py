"""Which layout is fastest on a machine: dense, static pruning and every candidate layout beside each other.

Speed is a bound by arithmetic (placement.py), quality is that of a small model's table (expected_loss.py), and what
llama.cpp refuses or runs slowly stands in engines/llama_cpp.py. No weight is read.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from moeify import engines, targets
from moeify.convert.bandwidth import gpu_read_rate, ram_read_rate
from moeify.convert.exactness import choose_target
from moeify.convert.expected_loss import expected_ratio
from moeify.convert.footprint import FALLBACKS, stored_as, weights_of
from moeify.convert.layouts import expert_counts
from moeify.convert.placement import Machine, Placement, Weights, place
from moeify.errors import InputError, UsageError, warn
from moeify.models.dense import DenseModel, open_dense
from moeify.options import GGUFType, MachineOptions, SplitOptions, Track, untracked
from moeify.plan import Layout, resolve_layout
from moeify.targets import Target
from moeify.words import number

ENGINE = "llama_cpp"
LEAST_EXPERTS, BLOCK = 8, 32
EIGHTHS_ACTIVE = (4, 5, 6, 7)
# Of the active experts.
SHARED_SHARES = (0.25, 0.5, 0.75)
CONTEXT = 4096
# Bounds that differ by less are equal: the number of experts changes nothing but the router's bytes.
SAME_SPEED = 0.02

Kind = Literal["dense", "static", "moe"]


@dataclass(frozen=True)
class Candidate:
    """One form of the model on the machine.

    Args:
        kind: dense, statically pruned, or a mixture of experts.
        layout: None for the dense model.
        expert_width: neurons of an expert; of the whole FFN for the others.
        active_share: of the FFN that a token uses.
        shared_share: of the FFN that is always on.
        read_bytes: what a token reads on both sides.
        ratio: perplexity over dense that the table expects; None where it says nothing.
        placement: where it lies and how fast it can be at most.
        refusal: why the engine does not run it, or "".
        caution: what runs slowly or is stored in another type, or "".
    """

    kind: Kind
    layout: Layout | None
    expert_width: int
    active_share: float
    shared_share: float
    read_bytes: int
    ratio: float | None
    placement: Placement
    refusal: str
    caution: str

    @property
    def runs(self) -> bool:
        """It fits, and the engine runs it."""
        return not self.refusal and not self.placement.refusal

    def is_within(self, quality: float) -> bool:
        return self.runs and self.ratio is not None and self.ratio <= quality


@dataclass(frozen=True)
class MachinePlan:
    """What a model can be on a machine.

    Args:
        model, family: the dense one.
        target: architecture of the candidates; "" if none represents the model exactly, so that there are none.
        type, context: what was counted with.
        machine: what it was counted for.
        quality: perplexity over dense that was allowed.
        floor_bytes: what a token reads however few experts run: attention, norms, head, keys and values.
        floor_tokens_per_second: the bound of that alone, placed as the dense model's is.
        candidates: the dense model first, then static pruning, then layouts.
        best: index of the fastest layout within the quality, or None.
        notes: what a reader has to know, in sentences.
    """

    model: str
    family: str
    target: str
    type: GGUFType
    context: int
    machine: Machine
    quality: float
    floor_bytes: int
    floor_tokens_per_second: float
    candidates: tuple[Candidate, ...]
    best: int | None
    notes: tuple[str, ...]

    @property
    def choice(self) -> Candidate | None:
        return None if self.best is None else self.candidates[self.best]


def machine_of(options: MachineOptions) -> Machine:
    """The machine that options describe; what they leave open is measured here.

    Raises:
        UsageError: a GPU is described without its bandwidth, and there is none here to measure.
    """
    vram, ram, measured = options.size("vram"), options.size("ram"), []
    has_gpu = torch.cuda.is_available()
    gpu_rate = (options.gpu_bandwidth or 0.0) * 1e9
    if vram is None:
        if options.gpu_bandwidth is not None:
            raise UsageError("--gpu-bandwidth says nothing of the GPU's memory", "say --vram 6GB as well")
        vram = torch.cuda.get_device_properties(0).total_memory if has_gpu else 0
    if vram and not gpu_rate:
        if not has_gpu:
            raise UsageError(
                "there is no GPU here whose bandwidth could be measured",
                "say --gpu-bandwidth 250, in GB/s, or --vram 0",
            )
        gpu_rate = gpu_read_rate()
        measured.append(f"GPU {number(gpu_rate / 1e9)} GB/s")
    threads, ram_rate = options.threads, (options.ram_bandwidth or 0.0) * 1e9
    if not ram_rate:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = threads or min(cores, psutil.cpu_count(logical=False) or cores)
        ram_rate = ram_read_rate(threads)
        measured.append(f"RAM {number(ram_rate / 1e9)} GB/s on {threads} thread{'s' if threads > 1 else ''}")
        # The RAM is this machine's.
        ram = ram if ram is not None else psutil.virtual_memory().total
    return Machine(vram, gpu_rate, ram, ram_rate, threads, ", ".join(measured))


def plan_for_machine(
    model: str | Path | DenseModel, options: MachineOptions | None = None, *, track: Track[Any] = untracked
) -> MachinePlan:
    """Count what a model reads for a token, dense and in every candidate layout, and what that allows on a machine.

    Raises:
        InputError: the model cannot be read.
        UsageError: the options contradict each other.
    """
    options = options or MachineOptions()
    dense = open_dense(model, track)
    return _planned(_case(dense, options, _target(dense)), options.quality)


def for_machine(dense: DenseModel, options: SplitOptions) -> SplitOptions:
    """The options with their machine turned into a layout: the fastest that the quality table allows.

    Raises:
        InputError: no layout does.
    """
    assert options.machine is not None
    described = MachineOptions.of_text(options.machine)
    target = _target(dense) if options.target == "auto" else targets.find(options.target)
    plan = _planned(_case(dense, described, target), described.quality)
    choice = plan.choice
    if choice is None or choice.layout is None:
        raise InputError(
            f"no layout of {dense.name} is within {plan.quality:g} times the dense perplexity on this machine: "
            f"{_why_none(plan)}",
            "`moeify plan` shows what there is; quality=1.6 allows more loss",
        )
    if choice.caution:
        warn(f"the layout for this machine, {choice.layout.num_experts} experts: {choice.caution}")
    if (rival := _rival(plan)) is not None:
        warn(rival)
    layout = choice.layout
    return replace(
        options,
        machine=None,
        experts=layout.num_experts,
        shared=layout.num_shared,
        active=layout.num_active,
        target=plan.target,
    )


def _target(dense: DenseModel) -> Target | None:
    """The preferred target that represents the model exactly and that the engine runs, or None."""

    def resolve(target: Target) -> Layout:
        return resolve_layout(LEAST_EXPERTS, None, None, holds_shared=target.holds_shared)

    try:
        return choose_target(dense, resolve, engine=engines.find(ENGINE))[0]
    except InputError:
        return None


@dataclass(frozen=True)
class _Case:
    """What every candidate of one plan has in common."""

    dense: DenseModel
    target: Target | None
    machine: Machine
    type: GGUFType
    context: int

    def weights(self, layout: Layout | None) -> Weights:
        return weights_of(self.dense, layout, self.type, self.context)

    def place(self, weights: Weights, *, routed: bool = False) -> Placement:
        return place(weights, self.machine, routed=routed, context=self.context)


def _case(dense: DenseModel, options: MachineOptions, target: Target | None) -> _Case:
    limit = int(dense.config.max_position_embeddings)
    context = options.context or min(CONTEXT, limit)
    if context > limit:
        raise UsageError(f"context {context:,} does not fit {dense.name}, which takes {limit:,}", f"--context {limit}")
    return _Case(dense, target, machine_of(options), options.type, context)


def _planned(case: _Case, quality: float) -> MachinePlan:
    dense, whole = case.dense, case.weights(None)
    floor = case.place(replace(whole, movable_read_bytes=0))
    candidates = tuple(_candidate(case, layout) for layout in (None, *layouts(dense, case.target)))
    plan = MachinePlan(
        model=dense.name,
        family=dense.family.model_type,
        target=case.target.model_type if case.target else "",
        type=case.type,
        context=case.context,
        machine=case.machine,
        quality=quality,
        floor_bytes=whole.always_bytes,
        floor_tokens_per_second=floor.tokens_per_second,
        candidates=candidates,
        best=_best(candidates, quality),
        notes=(),
    )
    return replace(plan, notes=tuple(_notes(plan)))


def layouts(dense: DenseModel, target: Target | None) -> Iterator[Layout]:
    """Static pruning to each share, then every candidate whose slices are equal and fill whole blocks of 32 weights."""
    if dense.num_neurons % 8 == 0:
        yield from (Layout(8, eighths, eighths) for eighths in EIGHTHS_ACTIVE)
    counts = [n for n in expert_counts(dense.num_neurons, dense.dtype) if n >= LEAST_EXPERTS]
    for experts in counts if target is not None else ():
        if dense.num_neurons % (BLOCK * experts):
            continue
        for active in (round(experts * eighths / 8) for eighths in EIGHTHS_ACTIVE):
            shared = {math.ceil(active * share) for share in SHARED_SHARES} if target and target.holds_shared else {0}
            yield from (Layout(experts, n, active) for n in sorted(shared) if n < active)


def _candidate(case: _Case, layout: Layout | None) -> Candidate:
    dense, weights = case.dense, case.weights(layout)
    if layout is None:
        placement = case.place(weights)
        return Candidate("dense", None, dense.num_neurons, 1.0, 1.0, weights.read_bytes, 1.0, placement, "", "")
    refusal = caution = ""
    width = layout.expert_width(dense.num_neurons)
    if not layout.is_static:
        assert case.target is not None
        engine, shape = engines.find(ENGINE), engines.Shape.of(dense, case.target.model_type, layout)
        refusal = case.target.refusal_of(engine, shape) or targets.refusal(case.target, dense, layout)
        caution = "; ".join(filter(None, (engine.caution(shape), _other_type(case.type, width))))
    return Candidate(
        kind="static" if layout.is_static else "moe",
        layout=layout,
        expert_width=width * layout.num_active if layout.is_static else width,
        active_share=layout.active_share,
        shared_share=layout.num_shared / layout.num_experts,
        read_bytes=weights.read_bytes,
        ratio=expected_ratio(layout),
        placement=case.place(weights, routed=not layout.is_static),
        refusal=refusal,
        caution=caution,
    )


def _other_type(kind: str, width: int) -> str:
    stored = stored_as(kind, width)
    return "" if stored == kind else f"down_proj of {width} neurons is stored in {stored}, not {kind}"


def _best(candidates: tuple[Candidate, ...], quality: float) -> int | None:
    """The fastest layout within the quality; of equally fast ones that of which nothing runs slowly, then the best."""
    within = [i for i, one in enumerate(candidates) if one.kind == "moe" and one.is_within(quality)]
    if not within:
        return None
    within = [i for i in within if not candidates[i].caution] or within
    fastest = max(candidates[i].placement.tokens_per_second for i in within)
    alike = [i for i in within if candidates[i].placement.tokens_per_second >= fastest * (1 - SAME_SPEED)]
    return min(alike, key=lambda i: candidates[i].ratio or 0.0)


def _rival(plan: MachinePlan) -> str | None:
    """That the dense model, or static pruning within the quality, is bound to be as fast as the best layout."""
    rivals = [one for one in plan.candidates if one.kind != "moe" and one.is_within(plan.quality)]
    if plan.choice is None or not rivals:
        return None
    rival = max(rivals, key=lambda one: one.placement.tokens_per_second)
    speed, other = (one.placement.tokens_per_second for one in (plan.choice, rival))
    if other < speed * (1 - SAME_SPEED):
        return None
    name = "the dense model" if rival.kind == "dense" else f"static pruning to {rival.active_share:.0%} of the FFN"
    return (
        f"{name} is expected within the quality too, and reaches {number(other)} tokens/s at most where the best "
        f"layout reaches {number(speed)}"
    )


def _why_none(plan: MachinePlan) -> str:
    """Why no layout is within the quality."""
    moes = [one for one in plan.candidates if one.kind == "moe"]
    if not moes:
        return "no target represents the model exactly, or its FFNs do not divide into 8 experts"
    running = [one for one in moes if one.runs]
    if not running:
        return next(one.refusal or one.placement.refusal for one in moes)
    ratios = [one.ratio for one in running if one.ratio is not None]
    return f"the table expects {min(ratios):.2f} at least" if ratios else "the table says nothing of them"


def _notes(plan: MachinePlan) -> Iterator[str]:
    """What a reader has to know of the rows."""
    yield (
        "bound: bytes read over bandwidth, added over both sides; real decode is slower, and low thread counts may be "
        "bound by arithmetic instead"
    )
    yield (
        "quality: perplexity over dense of SmolLM2-135M, nothing trained, between measured points interpolated; larger "
        "models lose less"
    )
    if plan.type in FALLBACKS:
        yield f"types: {plan.type} needs llama-quantize; mixes such as Q4_K_M hold some tensors in larger types"
    if all(one.placement.refusal for one in plan.candidates):
        yield f"nothing fits: {plan.candidates[0].placement.refusal}"
    if plan.choice is None:
        yield f"no layout is within {plan.quality:g} times the dense perplexity: {_why_none(plan)}"
    elif (rival := _rival(plan)) is not None:
        yield rival
    refused = [one for one in plan.candidates if one.refusal and one.layout]
    if refused:
        layout, name = refused[0].layout, engines.find(ENGINE).name
        assert layout is not None
        yield (
            f"{name} does not run {len(refused)} of the layouts, such as {layout.num_active} of {layout.num_experts} "
            f"experts with {layout.num_shared} shared: {refused[0].refusal}"
        )
