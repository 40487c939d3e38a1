"""The weights of one dense FFN and what it computes.

Legend: T tokens, D hidden size, F neurons.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN

# Tokens that go through attention, or through an FFN, at once: enough to keep the matrix units busy.
CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class FFNWeights:
    """One dense gated FFN, y = W_down (act(W_gate x) * (W_up x)), in the dtype and on the device of the arithmetic."""

    layer: int
    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    activation: str

    @property
    def num_neurons(self) -> int:
        return self.gate_FD.shape[0]

    def hidden(self, inputs_TD: Tensor) -> Tensor:
        """hidden_TF, what down_proj is applied to."""
        gated_TF: Tensor = ACT2FN[self.activation](inputs_TD @ self.gate_FD.T)
        return gated_TF.mul_(inputs_TD @ self.up_FD.T)

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        """outputs_TD of the dense FFN."""
        return torch.cat([self.hidden(chunk_TD) @ self.down_DF.T for chunk_TD in inputs_TD.split(CHUNK_TOKENS)])
