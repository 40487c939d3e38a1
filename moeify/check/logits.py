"""How far the outputs of two models that should be the same function are apart, and how far they may be."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moeify.models.inputs import Inputs, named, output_of

# SmolLM2-135M's reach 27.
USUAL_LOGIT = 30.0


class _Float64(TorchFunctionMode):
    """Norms, softmax and routers of stock models compute in float32 whatever the model's type; here in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider = {torch.float32: torch.float64}
        args = [wider.get(value, value) if isinstance(value, torch.dtype) else value for value in args]
        named = {
            name: wider.get(value, value) if isinstance(value, torch.dtype) else value
            for name, value in (kwargs or {}).items()
        }
        return torch.Tensor.double(*args) if func is torch.Tensor.float else func(*args, **named)


@torch.no_grad()
def logit_difference(
    model: Any, dense: Any, inputs: Tensor | Inputs, stored: torch.dtype, tolerance: float
) -> tuple[float, float]:
    """Largest difference of an output, a logit or a last hidden state, and how large it may be.

    In float32 or, if that is beyond the tolerance, in float64, which tells errors from rounding: experts add up in
    another order than the dense FFN, and through 30 layers of SmolLM2-135M that alone makes 0.8e-4 to 1.3e-4 in logits
    up to 27. Attention whose scores are in the thousands makes more of the last bit.

    Logits of usual models end at USUAL_LOGIT, and for those the tolerance is as it was given. It grows with logits
    beyond that, as rounding does: with a last norm of 1e10 they are 1e10, and float64 itself has no 1e-4 there.
    """
    # The loop over experts adds in a fixed order and in full precision.
    model.set_experts_implementation("eager")
    # A checkpoint in another dtype than the dense model is compared with the dense model rounded like it.
    for parameter in dense.parameters():
        parameter.copy_(parameter.to(stored))
    given = named(inputs)
    expected = output_of(dense(**given))
    allowed = tolerance * max(1.0, float(expected.abs().max()) / USUAL_LOGIT)
    difference = float((output_of(model(**given)) - expected).abs().max())
    if difference > allowed:
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
        with _Float64():
            difference = float((output_of(model.double()(**wide)) - output_of(dense.double()(**wide))).abs().max())
    return difference, allowed
