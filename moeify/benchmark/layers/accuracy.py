"""How exact a peer is, and what it keeps for backward. Everything here runs outside of what is timed.

The reference is computed in float64 from the definition, for a few tokens and for the weights of one expert, so that it
costs little at any size. T tokens, R the chosen ones, D hidden, F width, E experts, K experts a token, P = 2F or F.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.benchmark.layers.cases import Batch, Layer
from moeify.benchmark.layers.peers import Peer, dense_ffn

# Tokens whose output is compared.
NUM_ROWS = 16
# A peer is wrong, not inexact, beyond this many times eager's error, or beyond this error where that is larger.
WRONG_FACTOR = 4.0
WRONG_ERROR = 2e-2


@dataclass(frozen=True)
class Error:
    """Relative errors ||found - reference|| / ||reference||: of the output, and the largest one of the gradients."""

    output: float
    gradients: float | None = None

    def is_wrong(self, eager: "Error | None") -> bool:
        """Whether this is no rounding any more. A number that is not finite never passes."""
        pairs = [(self.output, eager.output if eager else 0.0)]
        if self.gradients is not None:
            pairs.append((self.gradients, (eager.gradients if eager else None) or 0.0))
        return not all(found <= max(WRONG_ERROR, WRONG_FACTOR * allowed) for found, allowed in pairs)


def outputs_and_gradients(peer: Peer, layer: Layer, batch: Batch, *, training: bool) -> list[Tensor]:
    """One call: [output_TD], and in training the gradients of inputs, routing weights (if it routes) and parameters."""
    forward = peer.build(layer)
    if not training:
        with torch.no_grad():
            return [forward(batch)]
    leaves = leaves_of(peer, batch)
    output_TD = forward(batch)
    found = torch.autograd.grad(output_TD, [*leaves, *peer.parameters(layer)], batch.output_gradient_TD)
    return [output_TD.detach(), *found]


def leaves_of(peer: Peer, batch: Batch) -> list[Tensor]:
    """The inputs of a batch that get gradients."""
    leaves = [batch.inputs_TD] if peer.dense else [batch.inputs_TD, batch.weights_TK]
    return [leaf.requires_grad_() for leaf in leaves]


class Reference:
    """Float64 results of one layer and batch.

    Args:
        dense: of the dense FFN instead of experts and shared part.
        training: also gradients: of the chosen tokens' inputs and routing weights, and of one expert's weights.
    """

    def __init__(self, layer: Layer, batch: Batch, *, dense: bool, training: bool) -> None:
        num_tokens = len(batch.inputs_TD)
        step = max(1, num_tokens // NUM_ROWS)
        self._rows_R = torch.arange(0, num_tokens, step, device=batch.inputs_TD.device)[:NUM_ROWS]
        self._dense = dense
        # The expert with the most tokens has the gradient with the most terms.
        self._expert = int(batch.experts_TK.flatten().bincount().argmax())
        self._expert_parameters = 2 if layer.bias_EP is None else 3
        self._expected = self._rows(layer, batch, training=training)
        if training and not dense:
            self._expected += self._expert_gradients(layer, batch)

    def error(self, found: Sequence[Tensor]) -> Error:
        """Of what `outputs_and_gradients` gave for the same layer and batch."""
        rows = 2 if self._dense else 3
        parts = [tensor[self._rows_R] for tensor in found[:rows]]
        if not self._dense and len(found) > rows:
            parts += [tensor[self._expert] for tensor in found[rows : rows + self._expert_parameters]]
        errors = [relative_error(part, expected) for part, expected in zip(parts, self._expected, strict=True)]
        # max() would let a NaN slip through.
        worst = math.nan if any(math.isnan(error) for error in errors[1:]) else max(errors[1:], default=None)
        return Error(errors[0], worst)

    def _rows(self, layer: Layer, batch: Batch, *, training: bool) -> list[Tensor]:
        inputs_RD = batch.inputs_TD[self._rows_R].detach().double().requires_grad_(training)
        weights_RK = batch.weights_TK[self._rows_R].detach().double().requires_grad_(training)
        with torch.set_grad_enabled(training):
            if self._dense:
                output_RD = _ffn(inputs_RD, layer.dense_up_PD, layer.dense_down_DI, layer.dense_bias_P)
            else:
                output_RD = self._layer(layer, inputs_RD, batch.experts_TK[self._rows_R], weights_RK)
        if not training:
            return [output_RD]
        leaves = [inputs_RD] if self._dense else [inputs_RD, weights_RK]
        gradient_RD = batch.output_gradient_TD[self._rows_R].double()
        return [output_RD.detach(), *torch.autograd.grad(output_RD, leaves, gradient_RD)]

    def _layer(self, layer: Layer, inputs_RD: Tensor, experts_RK: Tensor, weights_RK: Tensor) -> Tensor:
        output_RD = torch.zeros_like(inputs_RD)
        if layer.shared_up_PD is not None and layer.shared_down_DS is not None:
            output_RD = _ffn(inputs_RD, layer.shared_up_PD, layer.shared_down_DS, layer.shared_bias_P)
        for expert in experts_RK.unique().tolist():
            weight_R = (weights_RK * (experts_RK == expert)).sum(dim=-1)
            bias_P = None if layer.bias_EP is None else layer.bias_EP[expert]
            routed_RD = _ffn(inputs_RD, layer.up_EPD[expert], layer.down_EDF[expert], bias_P)
            output_RD = output_RD + routed_RD * weight_R[:, None]
        return output_RD

    def _expert_gradients(self, layer: Layer, batch: Batch) -> list[Tensor]:
        """Of the weights of the chosen expert, which need all of its tokens."""
        tokens, slots = (batch.experts_TK == self._expert).nonzero(as_tuple=True)
        given = [layer.up_EPD, layer.down_EDF] + ([] if layer.bias_EP is None else [layer.bias_EP])
        leaves = [weights[self._expert].detach().double().requires_grad_() for weights in given]
        bias_P = leaves[2] if len(leaves) > 2 else None
        output_TD = dense_ffn(batch.inputs_TD[tokens].detach().double(), leaves[0], leaves[1], bias_P)
        gradient_TD = batch.output_gradient_TD[tokens].double() * batch.weights_TK[tokens, slots].detach()[:, None]
        return list(torch.autograd.grad(output_TD, leaves, gradient_TD))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; NaN if anything is not finite."""
    return float((found.double() - expected).norm() / expected.norm())


def saved_bytes(call: Callable[[], object], weights: Sequence[nn.Parameter]) -> int:
    """Memory that autograd keeps between forward and backward, each storage once and whole, weights left out."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result holds what was saved, so that no address is used twice.
        result = call()
    del result
    return sum(num_bytes for pointer, num_bytes in kept.items() if pointer not in known)


def _ffn(inputs_TD: Tensor, up_PD: Tensor, down_DF: Tensor, bias_P: Tensor | None) -> Tensor:
    bias_P = None if bias_P is None else bias_P.detach().double()
    return dense_ffn(inputs_TD, up_PD.detach().double(), down_DF.detach().double(), bias_P)
