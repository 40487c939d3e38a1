"""What the kernels compute, in plain torch: the truth that they are tested against.

Shapes: see the package.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def moe_ffn_reference(
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *,
    bias_EP: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """The sum over a token's experts of weight * down(act(gate) * up), one expert after the other.

    Args:
        inputs_TD: any floating dtype; the arithmetic runs in it.
        up_EPD: rows [gate ; up] of each expert, or its up projection alone where nothing is gated.
        down_EDF: the second projection.
        experts_TK: int64; an id of E or more names no expert and adds nothing.
        weights_TK: what each expert's output is multiplied with.
        bias_EP: added to the rows of up_EPD's products, if it is there.
        activation: a key of ACTIVATIONS.
        gated: whether the first half of up_EPD gates the second.

    Returns:
        (T, D), in the dtype of inputs_TD.
    """
    out_TD = torch.zeros_like(inputs_TD)
    for expert in range(len(up_EPD)):
        token, rank = torch.where(experts_TK == expert)
        hidden = functional.linear(inputs_TD[token], up_EPD[expert], None if bias_EP is None else bias_EP[expert])
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = ACTIVATIONS[activation](gate) * up
        else:
            hidden = ACTIVATIONS[activation](hidden)
        weight = weights_TK[token, rank, None].to(inputs_TD.dtype)
        out_TD = out_TD.index_add(0, token, hidden @ down_EDF[expert].T * weight)
    return out_TD
