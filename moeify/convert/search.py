"""Which layers are cut, and how: the choice that changes the output least while only a share of the FFNs is active.

    moeify search MODEL --budget 0.75            a table, a choice, the frontier (JSON and SVG)
    moeify split MODEL --budget 0.75             the same greedy choice, then the split

The candidates of a layer are to stay dense, to go as a whole, or to be cut like all other cut layers: stock
architectures have one number of experts, and one of active experts, for the whole model. So a strategy chooses for each
layout which layers it is worth, and the best layout wins. An engine that takes no dense layers (`--engine llama.cpp`)
leaves one question: how many of the active experts are shared, so that it runs the others.

In moeify's own architecture every layer has its own number of active experts, so that all layouts are candidates of one
choice, which must lose less than all layers alike. SmolLM2-135M, 32 experts, 3 shared, half of the FFNs active,
perplexity over dense on three unseen texts of 2,048 tokens each, geometric mean: all layers alike 2.30, dense or 8
active 2.23, 8, 16, 24 or all by layer 1.92. With a range of active experts (`--min-active`) all layers alike have 1.60
at 50.8 %, by layer 1.72 at 50.5 %: thresholds already give tokens what they need. Fitted to 4,096 tokens of five texts
on the dense hidden states; a layer's losses by its error and one measured divergence (2 cores of an Intel Xeon,
2026-11-26).

Measured: SmolLM2-135M, 32 experts, five corpora, KL to dense on 1,024 tokens (2 cores of an Intel Xeon, 2026-11-22). At
75 % the greedy choice leaves layers 0-8 and 29 dense: 0.169 nats, where cutting every layer alike gives 0.205. The sum
of single layers' losses, which is all that greedy looks at, was 0.164 and 0.202.

Legend: L layers, B blocks of C tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeify import engines, strategies, targets
from moeify.cache import cache_dir, check_place, digest
from moeify.convert.depth import under_budget_by_depth
from moeify.convert.estimate import forward_flops, matmul_rate
from moeify.convert.prepare import MIN_TOKENS, Prepared, prepare
from moeify.convert.search_alike import comparison, layout_as_needed, points_alike
from moeify.convert.search_layouts import affordable_layouts, candidate_layouts, likely_layouts
from moeify.convert.search_points import Point, Points
from moeify.convert.search_scores import Absent, OutputCheck, score
from moeify.convert.texts import Blocks, calibration_inputs
from moeify.errors import InputError, UsageError, kept_when_interrupted
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.models.inputs import num_blocks, some_blocks
from moeify.options import Announce, SplitOptions, Track
from moeify.progress import Resumed, said, shown
from moeify.readable import Readable
from moeify.words import duration

# The frontier is drawn at these budgets, and at the one that was asked for.
FRONTIER = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
# Ranking layers takes fewer tokens than fitting them for good.
FIT_TOKENS = 8192
CHECK_TOKENS = 1024
# Time of fitting one candidate over that of the dense FFNs on the same tokens.
FIT_FACTOR = 2.0
# What tokens with as many experts as they need lose over what tokens with as many all lose, below which no choice by
# layer is looked for where time is short. Of the logarithms of perplexity over dense above they lose 0.56 and 0.48 of
# it on SmolLM2-135M (50 and 75 % active), choices by layer 0.78 and 0.75; of the divergence on text like that of the
# calibration, 96 experts, 50 %, 0.70.
CLEAR = 0.75


@dataclass(frozen=True, repr=False)
class SearchResult(Readable):
    """The choice under a budget, beside other choices.

    Args:
        model, budget: as given to the search.
        choice: the layers and the layout that the strategy chose.
        uniform: every layer cut alike, at the same budget.
        frontier: greedy choices for other budgets, by falling share.
        dense_perplexity: of the check text; NaN of a model that no perplexity is of, which is judged by the KL of its
            head's distribution, or by 1 - cosine of its last hidden states.
        losses: layout (`active/experts`, with `+shared` where that is a choice), or what is left out -> KL of every
            layer if only it is changed.
        by_depth: the control, whole layers dropped until the budget is met.
        as_needed: every layer cut alike, tokens with as many experts as they need; None in a stock architecture.
    """

    model: str
    budget: float
    choice: Point
    uniform: Point
    frontier: tuple[Point, ...]
    dense_perplexity: float
    losses: Mapping[str, Sequence[float]]
    by_depth: Point | None = None
    as_needed: Point | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of a split that follow from it."""
        layout = self.choice.layout
        return {
            "experts": layout.num_experts,
            "shared": layout.num_shared,
            "active": None if layout.active_by_layer else layout.num_active,
            "active_by_layer": layout.active_by_layer,
            "static_layers": layout.static_layers,
            "dense_layers": layout.dense_layers,
            "drop_layers": self.choice.dropped_layers,
            **({"min_active": layout.min_active, "max_active": layout.max_active} if layout.is_adaptive else {}),
        }


def search(
    model: str | Path | DenseModel,
    budget: float,
    options: SplitOptions | None = None,
    *,
    strategy: str = "greedy",
    trials: int = 32,
    frontier: bool = True,
    depth: bool = True,
    quick: bool = False,
    track: Track[Any] = shown,
    announce: Announce = said,
    **choices: Any,
) -> SearchResult:
    """Choose layers and layout under a budget; scored layers stay in the cache and are used again.

    Args:
        model: the dense model.
        budget: share of all FFN parameters that may be active per token.
        options: experts, methods, calibration.
        strategy: a plug-in of moeify.strategies.
        trials: how many whole choices a strategy may measure.
        frontier: also find and measure choices for other budgets, and the control by depth.
        depth: whole layers may go, too.
        quick: the likeliest candidates for cut layers, fitted to half as many tokens; see `likely_layouts`.
        track: wraps the loop over layers.
        announce: told the expected time before the work begins.
        choices: single options by name, in place of those in `options`.

    Raises:
        UsageError: the budget cannot be met by these candidates.
        InputError: no target holds the model with some layers dense, or it changed meanwhile.

    Example:
        result = moeify.search("builtin", 0.6, experts=8)
        moeify.split("builtin", "my-moe", **result.options)
    """
    options = SplitOptions.chosen(options, choices)
    if not 0 < budget < 1:
        raise UsageError(f"budget {budget} is out of range", "--budget takes more than 0 and less than 1")
    choose, greedy = (strategies.find(name) for name in (strategy, "greedy"))
    dense = open_dense(model, track)
    prepared = _prepared(dense, replace(options, tokens=min(options.tokens, FIT_TOKENS // (1 + quick))))
    layouts = candidate_layouts(prepared, budget)
    if quick and prepared.layout.dense_layers:
        layouts = likely_layouts(layouts, budget, by_layer=not prepared.target.is_stock)
    affordable_layouts(layouts, budget)
    text = _read(prepared)
    needs = layout_as_needed(prepared, budget)
    alike = _alike(prepared, text, needs, track, quick=quick) if needs else []
    if quick and alike and alike[0].divergence < CLEAR * alike[1].divergence:
        perplexity = math.exp(text.check.dense().log_perplexity)
        announce(comparison(*alike))
        return SearchResult(dense.name, budget, alike[0], alike[1], (), perplexity, {}, as_needed=alike[0])
    table = _score(prepared, layouts, text, track, announce, droppable=depth and not dense.family.is_pair)
    points = [table.best(limit, greedy, "greedy", 1) for limit in _limits(table, budget)] if frontier else []
    choice = table.best(budget, choose, strategy, trials)
    if alike:
        announce(comparison(alike[0], choice))
    result = SearchResult(
        model=dense.name,
        budget=budget,
        choice=min((choice, *alike[:1]), key=lambda point: point.divergence),
        uniform=table.uniform(budget),
        by_depth=table.by_depth(budget) if frontier else None,
        frontier=tuple(sorted(dict.fromkeys(points), key=lambda point: -point.share)),
        dense_perplexity=table.dense_perplexity,
        losses=table.losses,
        as_needed=alike[0] if alike else None,
    )
    dense.check_unchanged()
    return result


@dataclass(frozen=True)
class _Text:
    """What a search fits to, and what it measures on.

    Args:
        blocks: all of it.
        num_fit: blocks that are fitted to; the others are the check's.
        check: compares outputs.
    """

    blocks: Blocks
    num_fit: int
    check: OutputCheck


def _read(prepared: Prepared) -> _Text:
    blocks = calibration_inputs(prepared)
    context = prepared.options.context
    assert context is not None
    num_check = max(1, CHECK_TOKENS // context)
    num_fit = num_blocks(blocks.inputs) - num_check
    if num_fit <= 0:
        raise InputError(
            f"{blocks.provenance.num_tokens:,} tokens in blocks of {context:,} leave none to fit to",
            "take a smaller --context",
        )
    return _Text(blocks, num_fit, OutputCheck(prepared, some_blocks(blocks.inputs, slice(num_fit, None))))


def _alike(prepared: Prepared, text: _Text, needs: Layout, track: Track[Any], *, quick: bool) -> list[Point]:
    """Every layer alike, tokens with as many experts as they need; and, for a quick choice, all with as many."""
    layouts = [needs, *([replace(needs, min_active=0, max_active=0)] if quick else [])]
    file = _folder(prepared, layouts, text.blocks.provenance.sha256) / "alike.json"
    inputs = some_blocks(text.blocks.inputs, slice(text.num_fit))
    return points_alike(prepared, inputs, text.check, layouts, file=file, track=track)


def _score(
    prepared: Prepared,
    layouts: Sequence[Layout],
    text: _Text,
    track: Track[Any],
    announce: Announce,
    *,
    droppable: bool,
) -> Points:
    """Score every layout in every layer, or take the scores from the cache."""
    folder = _folder(prepared, layouts, text.blocks.provenance.sha256)
    announce(f"the search will take about {duration(_estimate(prepared, len(layouts), folder))}")
    layers = Resumed(score(prepared, text.blocks.inputs, text.check, layouts, folder), _num_scored(folder))
    with kept_when_interrupted("the layers that are scored"):
        scored = list(track(layers, "scoring layers", prepared.dense.num_layers))
    return Points(prepared, layouts, scored, text.check, droppable=droppable)


def under_budget(
    model: str | Path | DenseModel,
    options: SplitOptions,
    track: Track[Any] = shown,
    announce: Announce = said,
    *,
    quick: bool = False,
) -> SplitOptions:
    """The options with their budget turned into a layout and dense layers, by the greedy strategy.

    Args:
        model, options, track, announce: as of `search`.
        quick: as of `search`; then no layer goes.
    """
    assert options.budget is not None
    if options.static:
        return under_budget_by_depth(open_dense(model, track), options, track)
    result = search(
        model,
        options.budget,
        options,
        frontier=False,
        depth=not quick,
        quick=quick,
        track=track,
        announce=announce,
    )
    return replace(options, **result.options)


def _prepared(dense: DenseModel, options: SplitOptions) -> Prepared:
    """The split's preparation for a target that holds dense layers, with the tokens of a search."""
    if options.plan is not None or options.static or options.dense_layers or options.drop_layers:
        raise UsageError(
            "a budget chooses the layers itself", "leave --plan, --static, --dense-layers and --drop-layers out"
        )
    layers = options.active_by_layer or options.experts_by_layer or options.static_layers
    if options.active is not None or options.shared is not None or layers:
        raise UsageError(
            "a budget chooses how many experts are active",
            "leave --active, --active-by-layer, --experts-by-layer, --static-layers and --shared out",
        )
    if options.mixing == "soft":
        raise UsageError("soft mixing runs every expert, which no budget allows", "--mixing takes hard or softmax")
    if options.tokens < MIN_TOKENS:
        raise InputError(f"{options.tokens:,} calibration tokens are too few", f"--tokens takes {MIN_TOKENS:,} or more")
    tokens = options.tokens + CHECK_TOKENS
    # The range that tokens may have bounds what is chosen, so that any number in it will do until then.
    options = replace(options, budget=None, active=options.max_active or options.min_active)
    engine = engines.named(options.engine).name if options.engine else None
    # One dense layer stands for any number of them: the target must hold dense layers, and not only the first ones.
    layout = Layout(4, 1, 3, (1,))
    known = [targets.for_model(name, dense) for name in targets.names()]
    holds_dense = engine is None or any(
        engine in target.engines_with_dense and not target.refuse(dense, layout) for target in known
    )
    return prepare(dense, replace(options, tokens=tokens, dense_layers=(1,) if holds_dense else ()))


def _limits(table: Points, budget: float) -> list[float]:
    return sorted({limit for limit in (*FRONTIER, budget) if limit >= table.cheapest})


def _folder(prepared: Prepared, layouts: Sequence[Layout], text: str) -> Path:
    """The folder of this job's scored layers.

    Raises:
        DiskError: nothing can be written there.
    """
    options = {key: value for key, value in asdict(prepared.options).items() if key not in ("device", "target")}
    # Scores of old versions know nothing of layers that go.
    key = digest("depth", prepared.dense.fingerprint(), options, [asdict(layout) for layout in layouts], text)
    folder = cache_dir() / f"search-{key[:16]}"
    check_place(folder / "layer")
    return folder


def _num_scored(folder: Path) -> int:
    """Layers that an earlier search scored."""
    return len(list(folder.glob("layer-*.safetensors")))


def _estimate(prepared: Prepared, num_layouts: int, folder: Path) -> float:
    """Seconds for what is not scored yet."""
    left = prepared.dense.num_layers - _num_scored(folder)
    fit = forward_flops(prepared.dense, prepared.options.tokens) * (1 + FIT_FACTOR * num_layouts)
    rest = forward_flops(prepared.dense, CHECK_TOKENS) * (num_layouts + len(Absent)) * prepared.dense.num_layers / 2
    return (fit + rest) * left / prepared.dense.num_layers / matmul_rate(prepared.options.device)
