"""The control by depth: whole layers, or FFNs alone, are left out until a budget is met, and nothing else changes.

    moeify split MODEL --static --budget 0.75      drops whole layers and writes the rest: a shallower dense model

A layer that goes takes its attention and its keys and values along, so that at the same FFN budget it saves more than
a split does. An FFN that goes alone leaves them; no stock architecture has such a layer, so that it is measured and
never written. Which layers: those that change the output least, one after another, each measured together with those
before it, as SLEB does (https://arxiv.org/abs/2402.09025).

Measured: SmolLM2-135M, KL to dense on 1,024 tokens of Wikipedia and Python's reference. Without eight of 30 layers,
73 % of the FFN left: 1.24 nats, perplexity 59.7. With 75 % of 32 experts active: 0.166 and 18.4, searched 0.143. So a
search there lets no layer go, at 75 % nor at 50 % (2 cores of an Intel Xeon, 2026-11-26; `moeify search MODEL --experts
32 --budget 0.75 --tokens 8192`).

Of the controls it is a strong one: at 75 %, calibrated on 8,192 tokens of Wikipedia and Python's reference, perplexity
on 12,288 tokens of Moby-Dick, State of the Union and other Wikipedia is 66.7 by depth and 62.4 of static pruning with
refit (dense 30.8), on Moby-Dick alone 103.5 and 109.7, and it saves a quarter of attention and cache besides.

Legend: L layers, B blocks of C tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from moeify import strategies
from moeify.cache import cache_dir, digest, once
from moeify.convert.prepare import MIN_TOKENS, WHOLE_SLICES, Prepared, prepare
from moeify.convert.search_scores import Absent, Change, OutputCheck
from moeify.convert.texts import DEFAULT_CONTEXT, calibration_inputs
from moeify.data.documents import BUILTIN
from moeify.errors import InputError, UsageError
from moeify.models.dense import DenseModel
from moeify.models.inputs import Inputs, named, num_blocks, some_blocks
from moeify.options import SplitOptions, Track
from moeify.strategies import TOLERANCE, Choice, Problem
from moeify.strategies._repair import FREE

BY_DEPTH = "static by depth"
# Candidates of a layer; behind them a search has those that are cut.
STAYS, DROPPED = 0, 1
# Text by which layers are chosen, as of a search.
DEPTH_TOKENS = 1024
# Choices that may be measured; guesses decide about what is left.
DEPTH_TRIALS = 40


def depth_problem(losses: Sequence[float], budget: float, joint: Callable[[Choice], float], trials: int) -> Problem:
    """Which layers go, for a strategy.

    Args:
        losses: change of the output if a layer alone goes, KL in nats per token.
        budget: share of the layers that stays at most.
        joint: measured loss of a whole choice.
        trials: at most so many calls of that.
    """
    costs = np.tile([1.0, 0.0], (len(losses), 1))
    # What is free goes last: no more layers go than must.
    table = np.array([[0.0, max(loss, FREE)] for loss in losses])
    return Problem(costs, table, budget, joint, trials, seed=0)


def left_out(choice: Choice) -> tuple[int, ...]:
    """Layers that go."""
    return tuple(layer for layer, candidate in enumerate(choice) if candidate == DROPPED)


def choose_absent(
    prepared: Prepared, inputs: Tensor | Inputs, absent: Absent, num_layers: int, track: Track[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers that lose least when they, or their FFNs, go; and the others, the next to go first.

    Args:
        prepared: the whole model.
        inputs: what to choose by; a tensor is ids_BC of text.
        absent: what goes.
        num_layers: how many.
        track: wraps the loop over layers.
    """
    dense = prepared.dense
    key = (dense.fingerprint(), absent.value, num_layers, *(tensor.numpy() for tensor in named(inputs).values()))
    file = cache_dir() / "depth" / f"{digest(*key)}.json"

    def choose() -> dict[str, Any]:
        check = OutputCheck(prepared, inputs)
        losses = [change.divergence for change in check.without(absent, track)]

        def joint(choice: Choice) -> float:
            changes: list[Change] = [absent if candidate == DROPPED else None for candidate in choice]
            return check.joint(prepared.layout, changes).divergence

        problem = depth_problem(losses, 1 - num_layers / dense.num_layers, joint, DEPTH_TRIALS)
        gone = left_out(strategies.find("stepwise")(problem)) if num_layers else ()
        dense.check_unchanged()
        return {"gone": gone, "losses": losses}

    found = once(file, choose)
    gone = tuple(found["gone"])
    others = [layer for layer in range(dense.num_layers) if layer not in gone]
    return gone, tuple(sorted(others, key=lambda layer: found["losses"][layer]))


def under_budget_by_depth(dense: DenseModel, options: SplitOptions, track: Track[Any]) -> SplitOptions:
    """The options of a static model under a budget: which whole layers go.

    Raises:
        UsageError: nothing would be left, or the options say already how it is cut.
    """
    assert options.budget is not None
    if dense.family.is_pair:
        raise InputError(
            f"{dense.name} has an encoder and a decoder, of which no layers can be dropped",
            "--active prunes the FFNs of every layer",
        )
    chosen = {"--active": options.active, "--drop-layers": options.drop_layers, "--experts": options.experts}
    if given := [name for name, value in chosen.items() if value]:
        raise UsageError(
            f"--static --budget drops whole layers, and {given[0]} cuts otherwise", f"leave {given[0]} out"
        )
    num_dropped = math.ceil((1 - options.budget) * dense.num_layers - TOLERANCE)
    if num_dropped >= dense.num_layers:
        raise UsageError(
            f"a budget of {options.budget:g} leaves none of {dense.num_layers} layers",
            f"--budget takes {1 / dense.num_layers:.3g} or more",
        )
    # A block of each text at least.
    blocks = len(options.calibration or BUILTIN) * (options.context or DEFAULT_CONTEXT)
    tokens = max(DEPTH_TOKENS, MIN_TOKENS, blocks)
    whole = replace(options, budget=None, tokens=tokens, experts=WHOLE_SLICES, active=WHOLE_SLICES)
    prepared = prepare(dense, whole, writable=False)
    gone, _ = choose_absent(prepared, calibration_inputs(prepared).inputs, Absent.LAYER, num_dropped, track)
    return replace(options, budget=None, drop_layers=gone)


def check_inputs(inputs: Inputs, block_tokens: int) -> Inputs:
    """The last blocks of the calibration inputs, by which layers are chosen.

    Args:
        inputs: all blocks.
        block_tokens: that the model makes of one.
    """
    needed, given = max(1, DEPTH_TOKENS // block_tokens), num_blocks(inputs)
    if given < needed:
        raise InputError(f"{given * block_tokens:,} tokens are too few to choose layers by", "give more --tokens")
    return some_blocks(inputs, slice(given - needed, None))
