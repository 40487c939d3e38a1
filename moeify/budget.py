"""What each layer's candidates cost and what they do to the model's output: the table that a search chooses from.

One pass through the dense model. In every layer each candidate is fitted on the dense hidden states, then a few blocks
of check text go on through the dense rest of the model once for each candidate, and their output distribution is
compared with the dense model's. Losses are of one changed layer at a time; `joint_loss` is for what they do together.

Legend: T tokens, D hidden size, B check blocks of C tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify import partition, routers
from moeify.calibration import HiddenStream
from moeify.layer import ConvertedFFN, LayerFit, converted, fit_layer
from moeify.plan import LayerPlan, Layout
from moeify.prepare import Prepared


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's candidates.

    Args:
        layer: index.
        losses: mean KL(dense || changed) of a check token in nats, for each layout.
        plans: what was fitted, for each layout.
    """

    layer: int
    losses: tuple[float, ...]
    plans: tuple[LayerPlan, ...]


def layer_fit(prepared: Prepared, layout: Layout) -> LayerFit:
    """How to decide a layer under these options."""
    options = prepared.options
    return LayerFit(
        layout=layout,
        partition=partition.find(options.partition),
        router=routers.find(options.router),
        gate=prepared.gate,
        refit=options.refit,
        dtype=prepared.dtype,
        seed=options.seed,
    )


def score(
    prepared: Prepared, ids_BC: Tensor, num_check_blocks: int, layouts: Sequence[Layout]
) -> Iterator[ScoredLayer]:
    """Fit and score every layout in every layer.

    Args:
        prepared: the model and the methods.
        ids_BC: calibration blocks, and after them the check blocks.
        num_check_blocks: how many of them only check.
        layouts: the candidates beside leaving the layer dense.
    """
    dense = prepared.dense
    checks = OutputCheck(prepared, ids_BC[-num_check_blocks:])
    stream = HiddenStream(dense, ids_BC, prepared.options.device)
    num_fit = (len(ids_BC) - num_check_blocks) * ids_BC.shape[1]
    for layer in range(dense.num_layers):
        ffn = prepared.ffn(layer)
        inputs_TD = stream.attend(layer)
        residual_TD = stream.residual()[num_fit:]
        fitted = [fit_layer(ffn, inputs_TD[:num_fit], layer_fit(prepared, layout))[0] for layout in layouts]
        changed_TD = torch.cat([residual_TD + found(inputs_TD[num_fit:]) for found in fitted])
        losses = checks.losses(stream.fork(changed_TD), layer + 1)
        yield ScoredLayer(layer, tuple(losses), tuple(found.plan for found in fitted))
        stream.advance(ffn(inputs_TD))


class OutputCheck:
    """Compares changed models with the dense one by their output distributions on the same text."""

    def __init__(self, prepared: Prepared, ids_BC: Tensor) -> None:
        self._prepared, self._ids_BC = prepared, ids_BC
        self._dense = HiddenStream(prepared.dense, ids_BC, prepared.options.device)
        for layer in range(prepared.dense.num_layers):
            self._dense.pass_through(layer, prepared.ffn(layer))

    def losses(self, stream: HiddenStream, first_layer: int) -> list[float]:
        """Mean KL(dense || changed) in nats for each of the variants in `stream`, dense from `first_layer` on."""
        for layer in range(first_layer, self._prepared.dense.num_layers):
            stream.pass_through(layer, self._prepared.ffn(layer))
        return self._compare(stream)

    def joint_loss(self, plans: Sequence[LayerPlan | None], layouts: Sequence[Layout | None]) -> float:
        """The same for one whole choice; None leaves a layer dense."""
        stream = HiddenStream(self._prepared.dense, self._ids_BC, self._prepared.options.device)
        for layer, (plan, layout) in enumerate(zip(plans, layouts, strict=True)):
            ffn = self._prepared.ffn(layer)
            if plan is None or layout is None:
                stream.pass_through(layer, ffn)
            else:
                found: ConvertedFFN = converted(ffn, plan, layer_fit(self._prepared, layout))
                stream.pass_through(layer, found)
        return self._compare(stream)[0]

    def _compare(self, stream: HiddenStream) -> list[float]:
        num_blocks = len(self._ids_BC)
        num_variants = len(stream.residual()) // self._ids_BC.numel()
        dense_logits = [logits_CV.log_softmax(dim=1) for logits_CV in self._dense.logits(num_blocks)]
        losses = torch.zeros(num_variants)
        for i, logits_CV in enumerate(stream.logits(num_variants * num_blocks)):
            expected_CV = dense_logits[i % num_blocks]
            divergence = (expected_CV.exp() * (expected_CV - logits_CV.log_softmax(dim=1))).sum(dim=1).mean()
            losses[i // num_blocks] += float(divergence) / num_blocks
        return losses.tolist()
