"""Which layout is fastest on a machine: dense, static pruning and every candidate layout beside each other.

Speed is a bound by arithmetic (placement.py), quality is that of a small model's table (expected_loss.py), and what
llama.cpp refuses or runs slowly stands in engines/llama_cpp.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeify import engines, targets
from moeify.command_line import command_line
from moeify.convert.bandwidth import machine_of
from moeify.convert.candidates import ENGINE, LEAST_EXPERTS, Candidate, Case, candidate, layouts
from moeify.convert.exactness import choose_target
from moeify.convert.footprint import FALLBACKS
from moeify.convert.placement import Machine
from moeify.errors import InputError, UsageError, warn
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.models.heads import LANGUAGE_MODELS, auto_name, class_of
from moeify.options import GGUFType, MachineOptions, SplitOptions, Track
from moeify.progress import shown
from moeify.readable import Readable
from moeify.targets import Target
from moeify.words import number

CONTEXT = 4096
# Bounds that differ by less are equal: the number of experts changes nothing but the router's bytes.
SAME_SPEED = 0.02


@dataclass(frozen=True, repr=False)
class MachinePlan(Readable):
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


def plan_for_machine(
    model: str | Path | DenseModel,
    options: MachineOptions | None = None,
    *,
    track: Track[Any] = shown,
    **choices: Any,
) -> MachinePlan:
    """Count what a model reads for a token, dense and in every candidate layout, and what that allows on a machine.

    Args:
        model: a folder, a .gguf file, a hub id, `builtin`, or a model that is open already.
        options: the machine, and in what form the model shall run.
        track: shows the progress of making the embedded model.
        choices: single options by name, in place of those in `options`.

    Raises:
        InputError: the model cannot be read.
        UsageError: the options contradict each other.

    Example:
        plan = moeify.plan_for_machine("builtin", vram="0", ram_bandwidth=50)
        print(plan.choice)
    """
    options = MachineOptions.chosen(options, choices)
    dense = open_dense(model, track)
    return _planned(_case(dense, options, _target(dense)), options.quality)


def for_machine(dense: DenseModel, options: SplitOptions) -> SplitOptions:
    """The options with their machine turned into a layout: the fastest that the quality table allows.

    Raises:
        InputError: no layout does.
    """
    assert options.machine is not None
    described = MachineOptions.of_text(options.machine)
    target = _target(dense) if options.target == "auto" else targets.for_model(options.target, dense)
    plan = _planned(_case(dense, described, target), described.quality)
    choice = plan.choice
    if choice is None or choice.layout is None:
        raise InputError(
            f"no layout of {dense.name} is within {plan.quality:g} times the dense perplexity on this machine: "
            f"{_why_none(plan)}",
            "`moeify plan` shows what there is; quality=1.6 allows more loss",
        )
    if (rival := _rival(plan)) is not None:
        warn(rival)
    layout = choice.layout
    return replace(
        options,
        machine=None,
        experts=layout.num_experts,
        shared=layout.num_shared,
        active=layout.num_active,
        engine=engines.find(ENGINE).name,
    )


def _target(dense: DenseModel) -> Target | None:
    """The preferred target that represents the model exactly and that the engine runs, or None."""

    def resolve(target: Target) -> Layout:
        return target.layout(LEAST_EXPERTS)

    try:
        return choose_target(dense, resolve, engine=engines.find(ENGINE))[0]
    except InputError:
        return None


def _check_writes(dense: DenseModel) -> None:
    """Refuse what writes no text token by token: bytes read for a token bound the speed of nothing else.

    Raises:
        InputError: it is an encoder, hears, or sees.
    """
    if auto_name(dense.config) not in LANGUAGE_MODELS:
        name = str(dense.name)
        raise InputError(
            f"a plan counts the bytes that a language model reads for a token, {name} is a "
            f"{class_of(dense.config).__name__}, whose time is arithmetic for the most part",
            f"`{command_line('search', name, budget=0.5)}` measures what layouts of it lose, `moeify bench` its time",
        )


def _case(dense: DenseModel, options: MachineOptions, target: Target | None) -> Case:
    _check_writes(dense)
    limit = int(dense.text_config.max_position_embeddings)
    context = options.context or min(CONTEXT, limit)
    if context > limit:
        raise UsageError(f"context {context:,} does not fit {dense.name}, which takes {limit:,}", f"--context {limit}")
    return Case(dense, target, machine_of(options), options.type, context)


def _planned(case: Case, quality: float) -> MachinePlan:
    dense, whole = case.dense, case.weights(None)
    floor = case.place(replace(whole, movable_read_bytes=0))
    candidates = tuple(candidate(case, layout) for layout in (None, *layouts(dense, case.target)))
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
        "bound: bytes read over bandwidth, added over both sides; few threads may be bound by arithmetic instead, and "
        "a model that fits into the processor's cache may be faster"
    )
    yield (
        "a better --ram-bandwidth is that of engine, type and threads together: tokens/s of `llama-bench -ngl 0 -p 0 "
        "-n 32 -t N` on the dense GGUF, times the GB that it reads for a token"
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
