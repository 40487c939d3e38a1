"""How many experts tokens have on the texts of a benchmark, where that is a token's own: counted, not the most."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from moeify.benchmark.models.examples import Examples
from moeify.benchmark.models.inputs import Entrant, Texts, model_of
from moeify.benchmark.models.results import Model
from moeify.check.active import ActiveShare
from moeify.check.features import on_device
from moeify.models.inputs import Inputs, uncached
from moeify.options import Track


@torch.no_grad()
def counted(one: Entrant, model: Any, texts: Texts | Examples, track: Track[Any]) -> Entrant:
    """The entrant with the experts that a token of these texts has, in the mean over layers and tokens.

    Args:
        one: as its config says; returned as it is where all tokens have as many.
        model: it, loaded.
        texts: of the run.
        track: wraps the loop over blocks.
    """
    experts, active = one.anatomy.experts, ActiveShare(model)
    if experts is None or not active.is_counted:
        return one
    blocks = list(_blocks(texts))
    with active:
        for inputs in track(blocks, f"counting experts of {one.name}", len(blocks)):
            model(**on_device(inputs, model), **uncached(model))
    return replace(one, anatomy=replace(one.anatomy, experts=replace(experts, mean_chosen=active.num_chosen)))


def resized(before: Model, one: Entrant, dense_ffn: int, *, context: int, element_bytes: int) -> Model:
    """The row of a model whose experts were counted; arguments as of `model_of`."""
    now = model_of(one, dense_ffn, context=context, element_bytes=element_bytes)
    return replace(
        before, num_active=now.num_active, mean_active=now.mean_active, active_share=now.active_share, parts=now.parts
    )


def _blocks(texts: Texts | Examples) -> Iterator[Inputs]:
    if isinstance(texts, Examples):
        yield from (inputs for some in texts.sources.values() for inputs in some)
        return
    yield from ({"input_ids": ids_C[None]} for ids_BC in texts.blocks.values() for ids_C in ids_BC)
