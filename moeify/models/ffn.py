"""The weights of one dense FFN, how they are read from disk and written back, and what the FFN computes.

Legend: T tokens, D hidden size, F neurons, n of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from transformers.activations import ACT2FN

from moeify.families import FFNFormat

# Tokens that go through attention, or through an FFN, at once: enough to keep the matrix units busy.
CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class FFNWeights:
    """One FFN, y = W_down (act(W_gate x) * (W_up x)), or y = W_down act(W_up x) if it has no gate; biases where given.

    Args:
        layer: index of its block.
        gate_FD: None if it has no gate.
        up_FD, down_DF: in the dtype and on the device of whoever holds them.
        activation: its name in transformers.
        gate_bias_F, up_bias_F, down_bias_D: None if it has none.
    """

    layer: int
    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    activation: str
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    @property
    def num_neurons(self) -> int:
        return self.up_FD.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.up_FD.shape[1]

    @property
    def is_plain_gated(self) -> bool:
        """It has a gate and no bias, as the experts of every stock architecture have."""
        return self.gate_FD is not None and all(b is None for b in (self.gate_bias_F, self.up_bias_F, self.down_bias_D))

    @property
    def directions_FD(self) -> Tensor:
        """What decides when a neuron fires: its gate row, or its up row if there is no gate."""
        return self.up_FD if self.gate_FD is None else self.gate_FD

    def hidden(self, inputs_TD: Tensor) -> Tensor:
        """hidden_TF, what down_proj is applied to."""
        if self.gate_FD is None:
            plain_TF: Tensor = ACT2FN[self.activation](linear(inputs_TD, self.up_FD, self.up_bias_F))
            return plain_TF
        gated_TF: Tensor = ACT2FN[self.activation](_product(inputs_TD, self.gate_FD, self.gate_bias_F))
        return gated_TF.mul_(_product(inputs_TD, self.up_FD, self.up_bias_F))

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        """outputs_TD of the dense FFN."""
        chunks = [self.hidden(chunk_TD) @ self.down_DF.T for chunk_TD in inputs_TD.split(CHUNK_TOKENS)]
        return self.with_bias(torch.cat(chunks))

    def with_bias(self, outputs_TD: Tensor) -> Tensor:
        """Outputs of down_proj with its bias added, in place."""
        return outputs_TD if self.down_bias_D is None else outputs_TD.add_(self.down_bias_D)

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by its name here."""
        names = ("gate_FD", "up_FD", "down_DF", "gate_bias_F", "up_bias_F", "down_bias_D")
        parts: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> "FFNWeights":
        """The FFN with every tensor changed alike."""
        return self._with({name: change(tensor) for name, tensor in self.tensors().items()})

    def _with(self, tensors: Mapping[str, Any]) -> "FFNWeights":
        return replace(self, **tensors)

    def neurons(self, index_n: Tensor | slice) -> "FFNWeights":
        """The FFN of these neurons alone, in this order; the bias of down_proj stays whole."""

        def take(name: str, tensor: Tensor) -> Tensor:
            if name == "down_bias_D":
                return tensor
            return tensor[:, index_n] if name == "down_DF" else tensor[index_n]

        return self._with({name: take(name, tensor) for name, tensor in self.tensors().items()})


def padded(ffn: FFNWeights, count: int) -> FFNWeights:
    """The FFN with `count` neurons of zeros behind its own; its outputs stay what they are."""
    if not count:
        return ffn

    def widen(name: str, tensor: Tensor) -> Tensor:
        if name == "down_bias_D":
            return tensor
        return pad(tensor, (0, count) if tensor.ndim == 1 or name == "down_DF" else (0, 0, 0, count))

    return replace(ffn, **{name: widen(name, tensor) for name, tensor in ffn.tensors().items()})  # type: ignore[arg-type]


def joined(first: FFNWeights, second: FFNWeights) -> FFNWeights:
    """The neurons of both, those of the first one first; they have the same parts, and one bias of down_proj."""
    others = second.tensors()
    parts: dict[str, Any] = {
        name: torch.cat([tensor, others[name]], dim=1 if name == "down_DF" else 0)
        for name, tensor in first.tensors().items()
        if name != "down_bias_D"
    }
    return replace(first, **parts)


def tensor_names(ffn: FFNFormat, prefix: str, existing: Mapping[str, object]) -> tuple[str, ...]:
    """Names on disk of the matrices of one FFN and of the biases that exist.

    Args:
        ffn: how they lie there.
        prefix: name of the block.
        existing: names of all tensors.
    """
    wanted = [f"{prefix}.{module}.{part}" for part in ("weight", "bias") for module in ffn.modules]
    return tuple(name for name in wanted if name.endswith(".weight") or name in existing)


def unpack(ffn: FFNFormat, prefix: str, tensors: Mapping[str, Tensor], layer: int, activation: str) -> FFNWeights:
    """One FFN from the tensors that `tensor_names` names."""

    def part(module: str | None, name: str) -> Tensor | None:
        tensor = None if module is None else tensors.get(f"{prefix}.{module}.{name}")
        return tensor.T if tensor is not None and ffn.transposed and name == "weight" else tensor

    up_FD, down_DF = part(ffn.up, "weight"), part(ffn.down, "weight")
    gate_FD, gate_bias_F, up_bias_F = part(ffn.gate, "weight"), part(ffn.gate, "bias"), part(ffn.up, "bias")
    assert up_FD is not None
    assert down_DF is not None
    if ffn.fused:
        gate_FD, up_FD = up_FD.chunk(2)
        if up_bias_F is not None:
            gate_bias_F, up_bias_F = up_bias_F.chunk(2)
    return FFNWeights(layer, gate_FD, up_FD, down_DF, activation, gate_bias_F, up_bias_F, part(ffn.down, "bias"))


def pack(ffn: FFNFormat, prefix: str, weights: FFNWeights) -> dict[str, Tensor]:
    """The inverse of `unpack`: tensors by their names on disk."""
    up_FD, up_bias_F = weights.up_FD, weights.up_bias_F
    modules: dict[str, tuple[Tensor, Tensor | None]] = {}
    if weights.gate_FD is not None and not ffn.fused:
        assert ffn.gate is not None
        modules[ffn.gate] = (weights.gate_FD, weights.gate_bias_F)
    if weights.gate_FD is not None and ffn.fused:
        up_FD = torch.cat([weights.gate_FD, up_FD])
        if up_bias_F is not None and weights.gate_bias_F is not None:
            up_bias_F = torch.cat([weights.gate_bias_F, up_bias_F])
    modules |= {ffn.up: (up_FD, up_bias_F), ffn.down: (weights.down_DF, weights.down_bias_D)}
    tensors = {}
    for module, (weight, bias) in modules.items():
        tensors[f"{prefix}.{module}.weight"] = weight.T if ffn.transposed else weight
        if bias is not None:
            tensors[f"{prefix}.{module}.bias"] = bias
    return tensors


def _product(inputs_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    # Without a bias `@` and `linear` may differ in the last bit; the former is what plans were made with.
    return inputs_TD @ weight_FD.T if bias_F is None else linear(inputs_TD, weight_FD, bias_F)
