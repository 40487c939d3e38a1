"""Which layout and target a split takes: those that were asked for, else those that lose least where engines run well.

Nobody asks for a number of experts: the width decides. Engines run few wide experts faster than many narrow ones, and
many narrow ones lose less. Multiples of 256 are whole blocks of every quantised type of llama.cpp, of 64 whole tiles of
vLLM's and SGLang's kernels, of 32 whole blocks of llama.cpp's simple types.

Measured: perplexity of SmolLM2-135M (1536 neurons; 4,096 tokens of Wikipedia to fit) on 1,536 tokens of Moby-Dick / of
State of the Union, whose sampling moves a row by some percent (2 cores of an Intel Xeon, 2026-11-26):

    experts  static        8             12            16            24            32            48
    75 %     125.8 / 85.8  102.1 / 68.8   95.8 / 67.4   94.3 / 68.7   99.7 / 66.8   95.0 / 63.4   92.0 / 62.7
    50 %     234.5 / 164.2 205.3 / 142.7 202.4 / 154.7 200.3 / 141.5 198.2 / 136.3 194.3 / 142.1 177.8 / 125.8

What an engine that runs few routed experts costs: of 32 with 24 active, 6, 16 and 20 shared ones give 95.0 / 63.4,
97.7 / 68.8 and 104.8 / 71.8; with 16 active, 4, 8 and 12 give 194.3 / 142.1, 182.1 / 126.2 and 202.1 / 137.1.
"""

from dataclasses import replace

import torch

from moeify import engines, targets
from moeify.convert.exactness import check_target, choose_target
from moeify.engines import Engine, Shape
from moeify.errors import InputError
from moeify.layout import LayerChoice, Layout, resolve_layout
from moeify.models.dense import DenseModel
from moeify.options import SplitOptions
from moeify.targets import Target

# torch.nn.functional.grouped_mm, the default of transformers' experts, takes rows of a multiple of so many bytes.
ROW_BYTES = 16
MAX_EXPERTS = 128
# Widths of experts, the best first: multiples of a number, and the least number of experts that makes them worth it.
WIDTHS = ((256, 16), (64, 8), (32, 8), (16, 8))
# More are cut for nothing but whole blocks of 256; beyond 48, three quarters of them are more than engines run.
USUAL_EXPERTS, MOST_EXPERTS = 32, 48
# Where no width is good.
FEW_EXPERTS = 8


def expert_counts(num_neurons: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Numbers of experts, up to MAX_EXPERTS, that cut the FFN into slices which stock transformers can run."""
    multiple = ROW_BYTES // dtype.itemsize
    return tuple(n for n in range(2, MAX_EXPERTS + 1) if num_neurons % (n * multiple) == 0)


def preferred_counts(num_neurons: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Numbers of experts, the best first; empty if none works."""
    works = expert_counts(num_neurons, dtype)
    usual = [n for n in reversed(works) if n <= USUAL_EXPERTS]
    ranked = []
    for width, least in WIDTHS:
        more = [n for n in works if USUAL_EXPERTS < n <= MOST_EXPERTS and width == WIDTHS[0][0]]
        ranked += [n for n in (*usual, *more) if n >= least and num_neurons // n % width == 0]
    few = [n for n in usual if n <= FEW_EXPERTS]
    return tuple(dict.fromkeys((*ranked, *few, *works)))


def choose_layout(
    dense: DenseModel, options: SplitOptions, layers: LayerChoice, dtype: torch.dtype, *, writable: bool
) -> tuple[Layout, Target, str]:
    """The layout, the target and why it was taken.

    Args:
        dense: the model.
        options: what was asked for.
        layers: and of single layers of this model.
        dtype: of the checkpoint.
        writable: refuse what no checkpoint could hold.

    Raises:
        InputError: no target represents the model exactly, or an engine that must run it does not.
        UsageError: the options contradict each other.
    """
    if options.experts is not None:
        return _settle(dense, options, layers, dtype, options.experts, writable=writable)
    needed = max(options.active or 0, options.shared or 0, 2)
    # Where none divides them, neurons of zeros are added if the target takes that; else a refusal follows.
    counts = preferred_counts(dense.num_neurons, dtype) or (FEW_EXPERTS,)
    enough = [n for n in counts if n >= needed] or counts[:1]
    for experts in enough:
        try:
            layout, target, reason = _settle(dense, options, layers, dtype, experts, writable=writable)
        except InputError:
            # Nothing else than the engine's limit depends on the number.
            if options.engine is None:
                raise
            continue
        if not any(verdict.refusal for verdict in verdicts(dense, target, layout)):
            return layout, target, reason
    # None is run by all engines that know its target.
    return _settle(dense, options, layers, dtype, enough[0], writable=writable)


def verdicts(dense: DenseModel, target: Target, layout: Layout) -> tuple[engines.Verdict, ...]:
    """What the engines that know the target say to this layout; none of a pruned model, which is dense."""
    if layout.is_static:
        return ()
    return engines.judge(Shape.of(dense, target.model_type, layout), target.known_to(layout))


def _check_width(dense: DenseModel) -> None:
    """Raise InputError unless a config of this family says how wide its FFNs are; one of today may hold any field."""
    kind, width = type(dense.text_config), dense.family.width
    if dense.family.narrowed is None and kind.attribute_map.get(width, width) not in kind().to_dict():
        raise InputError(
            f"the config of a {dense.family.model_type} has no field for the width of its FFNs: transformers would "
            f"expect {dense.num_neurons:,} neurons of the pruned model as well",
            "leave --static out",
        )


def _settle(
    dense: DenseModel,
    options: SplitOptions,
    layers: LayerChoice,
    dtype: torch.dtype,
    experts: int,
    *,
    writable: bool,
) -> tuple[Layout, Target, str]:
    """Layout and target for a number of experts."""
    engine = engines.named(options.engine) if options.engine else None

    def resolve(target: Target | None) -> Layout:
        active = experts if options.mixing == "soft" and not options.static else options.active
        holds_shared = target is None or target.holds_shared
        shared = options.shared if target is None or options.shared is not None else target.num_shared
        layout = resolve_layout(experts, shared, active, holds_shared=holds_shared, layers=layers)
        layout = adaptive(layout, options)
        if target is None:
            return layout
        if engine is None or options.shared is not None or not target.holds_shared:
            return layout
        return _with_few_routed(dense, engine, target, layout)

    if options.static:
        active = resolve(None).num_active
        layout = Layout(experts, active, active, layers.dense, active_by_layer=layers.active)
        if writable:
            _check_width(dense)
        return layout, targets.static_target(dense), "static pruning keeps the dense architecture"
    if options.target == "auto":
        try:
            target, layout, reason = choose_target(dense, resolve, options.mixing, engine, dtype)
        except InputError:
            if writable:
                raise
            return resolve(None), targets.static_target(dense), "only measured: no target represents it exactly"
        return layout, target, reason
    target = targets.for_model(options.target, dense)
    layout = resolve(target)
    exactness = check_target(target, dense, layout, options.mixing, dtype)
    if not exactness.exact:
        raise InputError(
            f"{options.target} does not represent this model exactly: {exactness.reason}",
            "`moeify inspect` lists the targets that do",
        )
    if engine is not None and (refusal := target.refusal_of(engine, Shape.of(dense, target.model_type, layout))):
        raise InputError(f"{engine.name} does not run this as {target.model_type}: {refusal}", "take --target auto")
    return layout, target, "asked for" + target.caution


def adaptive(layout: Layout, options: SplitOptions) -> Layout:
    """The layout with a range of active experts, if the options have one."""
    if options.min_active is None and options.max_active is None:
        return layout
    least = options.min_active or min(layout.num_shared + 1, layout.num_active)
    most = options.max_active or layout.num_experts
    return replace(layout, min_active=least, max_active=most)


def _with_few_routed(dense: DenseModel, engine: Engine, target: Target, layout: Layout) -> Layout:
    """The layout with as many of its active experts shared as the engine needs to run it; as it is if none helps."""
    for shared in range(layout.num_shared, layout.num_active):
        candidate = replace(layout, num_shared=shared)
        if not engine.refuse(Shape.of(dense, target.model_type, candidate)):
            return candidate
    return layout
