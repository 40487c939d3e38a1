"""What each layer's candidates cost and what they do to the model's output: the table that a search chooses from.

One pass through the dense model. In every layer each candidate is fitted on the dense hidden states, then a few blocks
of check text go on through the dense rest of the model once for each candidate, and their output distribution is
compared with the dense model's. Losses are of one changed layer at a time; `OutputCheck.joint` is for what they do
together. Finished layers stay in the cache, so that a run that was stopped goes on.

Legend: T tokens, D hidden size, B check blocks of C tokens, V vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeify.cache import intact, replacing
from moeify.calibration.stream import HiddenStream
from moeify.convert.layer import converted, fit_layer
from moeify.convert.output_change import PERPLEXITY, measure_of, output_change
from moeify.convert.prepare import Prepared
from moeify.layout import Layout
from moeify.models.inputs import Inputs, named
from moeify.options import Track
from moeify.plan import LayerPlan


@dataclass(frozen=True)
class OutputChange:
    """The output of a changed model on the check text, beside the dense model's.

    Args:
        divergence: mean KL(dense || changed) of a token's output distribution, nats; without a head 1 - cosine.
        log_perplexity: mean negative log-likelihood of a token, nats; NaN of what is no language model.
    """

    divergence: float
    log_perplexity: float


class Absent(Enum):
    """What of a layer is left out."""

    LAYER = "layer"
    FFN = "FFN"


# What becomes of a layer; None leaves it as it is.
Change = LayerPlan | Absent | None


class OutputCheck:
    """Compares changed models with the dense one by their outputs for the same inputs; a tensor is ids_BC of text."""

    def __init__(self, prepared: Prepared, inputs: Tensor | Inputs) -> None:
        self._prepared, self._inputs = prepared, named(inputs)
        self._dense = self.stream()
        for layer in range(prepared.dense.num_layers):
            self._dense.pass_through(layer, prepared.ffn(layer))

    @property
    def num_blocks(self) -> int:
        """Of the check."""
        return self._dense.num_blocks

    def stream(self) -> HiddenStream:
        """The check blocks in front of the first layer."""
        return self._prepared.stream(self._inputs)

    def finish(self, stream: HiddenStream, first_layer: int) -> list[OutputChange]:
        """Take one or several variants of the check blocks, through the dense rest of the model."""
        for layer in range(first_layer, self._prepared.dense.num_layers):
            stream.pass_through(layer, self._prepared.ffn(layer))
        return self.compare(stream)

    def joint(self, layout: Layout, changes: Sequence[Change]) -> OutputChange:
        """All layers changed together."""
        stream = self.stream()
        for layer, change in enumerate(changes):
            if change is Absent.LAYER:
                continue
            ffn = self._prepared.ffn(layer)
            if change is Absent.FFN:
                stream.pass_through(layer, torch.zeros_like)
            elif isinstance(change, LayerPlan):
                stream.pass_through(layer, converted(ffn, change, self._prepared.fit(layout)))
            else:
                stream.pass_through(layer, ffn)
        return self.compare(stream)[0]

    def without(self, absent: Absent, track: Track[Any]) -> list[OutputChange]:
        """Each layer changed alone: it is not there, or its FFN is not."""
        stream, changes = self.stream(), []
        num_layers = self._prepared.dense.num_layers
        for layer in track(range(num_layers), "leaving out layers", num_layers):
            stream.reach(layer)
            before_TD = stream.residual().clone()
            ffn, inputs_TD = self._prepared.ffn(layer), stream.attend(layer)
            behind_BCD = before_TD if absent is Absent.LAYER else stream.behind(torch.zeros_like(inputs_TD), 0)
            changes += self.finish(stream.fork(behind_BCD), layer + 1)
            stream.advance(ffn(inputs_TD))
        return changes

    def dense(self) -> OutputChange:
        """The dense model itself: no divergence, and its perplexity."""
        return self.compare(self._dense)[0]

    def compare(self, stream: HiddenStream) -> list[OutputChange]:
        """Variants of the check blocks that are through the model with the dense outputs."""
        num_blocks, config = self._dense.num_blocks, self._prepared.dense.config
        num_variants = stream.num_blocks // num_blocks
        sums = torch.zeros(num_variants, 2)
        # One walk for all: each begins by making the model around the blocks.
        changed_outputs = stream.outputs(v * num_blocks + b for b in range(num_blocks) for v in range(num_variants))
        for block, expected in enumerate(self._dense.outputs(range(num_blocks))):
            for variant, changed in enumerate(islice(changed_outputs, num_variants)):
                divergence = output_change(changed, expected, config).mean()
                sums[variant] += torch.stack([divergence, self._loss(block, changed)]).cpu() / num_blocks
        return [OutputChange(*row) for row in sums.tolist()]

    def _loss(self, block: int, outputs: Tensor) -> Tensor:
        """Of the next token; NaN where the outputs are of none."""
        if measure_of(self._prepared.dense.config) != PERPLEXITY:
            return torch.full((), torch.nan, device=outputs.device)
        return cross_entropy(outputs[:-1], self._inputs["input_ids"][block, 1:].to(outputs.device))


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's candidates beside the dense FFN.

    Args:
        layer: index.
        changes: of the output if only this layer is changed, for each layout.
        without_layer, without_ffn: the same if it, or its FFN, is not there.
        file: keeps the fitted plans.
    """

    layer: int
    changes: tuple[OutputChange, ...]
    without_layer: OutputChange
    without_ffn: OutputChange
    file: Path

    def plan(self, i: int) -> LayerPlan:
        """The fit for the i-th layout."""
        with safe_open(self.file, framework="pt") as reader:
            return LayerPlan.read(reader, self.layer, f"{i}.")


def score(
    prepared: Prepared, inputs: Tensor | Inputs, check: OutputCheck, layouts: Sequence[Layout], folder: Path
) -> Iterator[ScoredLayer]:
    """Fit and score every layout in every layer.

    Args:
        prepared: the model and the methods.
        inputs: calibration blocks, and after them those of the check; a tensor is ids_BC of text.
        check: compares outputs.
        layouts: the candidates beside leaving the layer dense.
        folder: keeps finished layers; it must belong to this very job.
    """
    stream = prepared.stream(inputs)
    first = stream.num_blocks - check.num_blocks
    for layer in range(prepared.dense.num_layers):
        stream.reach(layer)
        num_fit = first * stream.block_tokens
        before_ED = stream.residual()[num_fit:].clone()
        ffn, inputs_TD = prepared.ffn(layer), stream.attend(layer)
        file = folder / f"layer-{layer:05d}.safetensors"
        scored = intact(file, partial(_load, layer))
        if scored is None:
            fitted = [fit_layer(ffn, inputs_TD[:num_fit], prepared.fit(layout))[0] for layout in layouts]
            check_ED = inputs_TD[num_fit:]
            outputs = [*(candidate(check_ED) for candidate in fitted), torch.zeros_like(check_ED)]
            changed = [stream.behind(outputs_ED, first).flatten(0, 1) for outputs_ED in outputs]
            changed_BCD = torch.cat([before_ED, *changed])
            changes = check.finish(stream.fork(changed_BCD, first), layer + 1)
            prepared.dense.check_unchanged()
            _save(file, [candidate.plan for candidate in fitted], changes)
            scored = _load(layer, file)
        yield scored
        stream.advance(ffn(inputs_TD))


def _save(file: Path, plans: Sequence[LayerPlan], changes: Sequence[OutputChange]) -> None:
    tensors: dict[str, Tensor] = {}
    for i, plan in enumerate(plans):
        tensors |= plan.tensors(f"{i}.")
    rows = [[change.divergence, change.log_perplexity] for change in changes]
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata={"changes": json.dumps(rows)})


def _load(layer: int, file: Path) -> ScoredLayer:
    with safe_open(file, framework="pt") as reader:
        rows = json.loads(reader.metadata()["changes"])
    without_layer, *changes, without_ffn = (OutputChange(*row) for row in rows)
    return ScoredLayer(layer, tuple(changes), without_layer, without_ffn, file)
