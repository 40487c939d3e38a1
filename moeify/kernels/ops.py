"""The kernels joined to one differentiable operation: custom operators that torch.compile and CUDA graphs take whole.

Shapes: see the package.
"""

from typing import Any

import torch
from torch import Tensor

from moeify.kernels.backward import activation_grad, bias_grad, weight_grad
from moeify.kernels.combine import combine
from moeify.kernels.decode import decode
from moeify.kernels.launch import DECODE_TOKENS, backward_rows, forward_rows, key_of, launch_for
from moeify.kernels.matmul import expert_matmul
from moeify.kernels.reference import ACTIVATIONS
from moeify.kernels.routing import route
from moeify.kernels.single import single
from moeify.kernels.up import up

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def moe_ffn(
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
    """The sum over a token's experts of weight * down(act(gate) * up).

    Args:
        inputs_TD: bfloat16, float16 or float32, on a CUDA device (or anywhere under TRITON_INTERPRET=1).
        up_EPD: rows [gate ; up] of each expert, or its up projection alone where nothing is gated; of the same dtype.
        down_EDF: the second projection; of the same dtype.
        experts_TK: int64; an id of E or more names no expert and adds nothing.
        weights_TK: what each expert's output is multiplied with; any floating dtype.
        bias_EP: added to the rows of up_EPD's products, if it is there; of the same dtype as inputs_TD.
        activation: silu, gelu, gelu_tanh, gelu_quick, relu or relu2.
        gated: whether the first half of up_EPD gates the second.

    Returns:
        (T, D), in the dtype of inputs_TD; the same bits every time.

    Raises:
        ValueError: shapes, dtypes or the activation do not fit.
    """
    _check(inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK, bias_EP, activation, gated)
    given = (inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK, bias_EP)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in given]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        out_TD: Tensor = torch.ops.moeify.moe_ffn_keeping(*tensors, activation, gated)[0]
    else:
        out_TD = torch.ops.moeify.moe_ffn(*tensors, activation, gated)
    return out_TD


def _check(
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    bias_EP: Tensor | None,
    activation: str,
    gated: bool,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation} is none of {', '.join(ACTIVATIONS)}")
    if inputs_TD.dtype not in DTYPES or not inputs_TD.dtype == up_EPD.dtype == down_EDF.dtype:
        found = f"{inputs_TD.dtype} inputs, {up_EPD.dtype} and {down_EDF.dtype} weights"
        raise ValueError(f"{found}; expected one of bfloat16, float16 and float32 for all three")
    if bias_EP is not None and bias_EP.dtype != inputs_TD.dtype:
        raise ValueError(f"bias_EP is {bias_EP.dtype}, expected {inputs_TD.dtype} as the inputs")
    (num_tokens, dim), (num_experts, _, width) = inputs_TD.shape, down_EDF.shape
    expected = {
        "up_EPD": (up_EPD, (num_experts, width * (2 if gated else 1), dim)),
        "down_EDF": (down_EDF, (num_experts, dim, width)),
        "experts_TK": (experts_TK, (num_tokens, experts_TK.shape[-1])),
        "weights_TK": (weights_TK, tuple(experts_TK.shape)),
    }
    if bias_EP is not None:
        expected["bias_EP"] = (bias_EP, tuple(up_EPD.shape[:2]))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if experts_TK.dtype != torch.int64:
        raise ValueError(f"experts_TK is {experts_TK.dtype}, expected int64")


@torch.library.custom_op("moeify::moe_ffn", mutates_args=())
def _inference(
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    bias_EP: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """Without gradients."""
    if experts_TK.numel() == 0:
        return torch.zeros_like(inputs_TD)
    with torch.cuda.device_of(inputs_TD):
        tensors = (inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK, bias_EP)
        if len(inputs_TD) == 1:
            return single(*tensors, activation=activation, gated=gated)
        if len(inputs_TD) <= DECODE_TOKENS:
            return decode(*tensors, activation=activation, gated=gated)
        return _sorted(*tensors, None, activation, gated)


@_inference.register_fake
def _(inputs_TD: Tensor, *others: object) -> Tensor:
    return torch.empty_like(inputs_TD)


@torch.library.custom_op("moeify::moe_ffn_keeping", mutates_args=())
def _training(
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    bias_EP: Tensor | None,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the pre-activations (S, P) that the way back needs."""
    pre_SP = inputs_TD.new_empty(experts_TK.numel(), up_EPD.shape[1])
    if experts_TK.numel() == 0:
        return torch.zeros_like(inputs_TD), pre_SP
    with torch.cuda.device_of(inputs_TD):
        tensors = (inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK, bias_EP)
        return _sorted(*tensors, pre_SP, activation, gated), pre_SP


@_training.register_fake
def _(
    inputs_TD: Tensor, up_EPD: Tensor, down_EDF: Tensor, experts_TK: Tensor, *others: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(inputs_TD), inputs_TD.new_empty(experts_TK.numel(), up_EPD.shape[1])


def _sorted(
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    bias_EP: Tensor | None,
    pre_SP: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    num_experts, num_tokens, num_ranks = len(up_EPD), *experts_TK.shape
    rows, width = forward_rows(experts_TK.numel(), num_experts), down_EDF.shape[2]
    dtype, device = inputs_TD.dtype, inputs_TD.device
    routing = route(experts_TK, num_experts, rows)
    launch = launch_for(key_of("up", rows, width), dtype, device)
    named: dict[str, Any] = {"activation": activation, "gated": gated, "bias_EP": bias_EP, "pre_SP": pre_SP}
    hidden_SF = up(inputs_TD, up_EPD, routing, launch, **named)
    launch = launch_for(key_of("down", rows, width), dtype, device)
    rows_SD = expert_matmul(hidden_SF, down_EDF, routing, launch, transposed=True, to_slots=True, scale_S=weights_TK)
    return combine(rows_SD.view(num_tokens, num_ranks, -1), experts_TK, num_experts, dtype)


@torch.library.custom_op("moeify::moe_ffn_backward", mutates_args=())
def _backward(
    grad_TD: Tensor,
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    bias_EP: Tensor | None,
    pre_SP: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, up, down, weights and bias; an empty tensor for what is not wanted."""
    if experts_TK.numel() == 0:
        tensors = (inputs_TD, up_EPD, down_EDF, weights_TK, pre_SP if bias_EP is None else bias_EP)
        return tuple(torch.zeros_like(tensor) for tensor in tensors)  # type: ignore[return-value]
    with torch.cuda.device_of(inputs_TD):
        num_experts, num_ranks = len(up_EPD), experts_TK.shape[1]
        rows, width = backward_rows(experts_TK.numel(), num_experts), down_EDF.shape[2]
        dtype, device = inputs_TD.dtype, inputs_TD.device
        routing = route(experts_TK, num_experts, rows)
        launch = launch_for(key_of("down_grad", rows, width), dtype, device)
        grad_SF = expert_matmul(grad_TD, down_EDF, routing, launch, transposed=False, from_tokens=True)
        grad = activation_grad(grad_SF, pre_SP, weights_TK, routing, activation=activation)
        launch = launch_for(key_of("weight_grad", 128, width), dtype, device)
        by_expert: dict[str, Any] = {"routing": routing, "num_experts": num_experts, "num_ranks": num_ranks}
        by_expert["launch"] = launch
        # Returned tensors must not share memory, not even the empty ones.
        found = [inputs_TD.new_empty(0) for _ in range(4)]
        if wanted[0]:
            launch = launch_for(key_of("input_grad", rows, width), dtype, device)
            rows_SD = expert_matmul(grad.pre_SP, up_EPD, routing, launch, transposed=False, to_slots=True)
            found[0] = combine(rows_SD.view(*experts_TK.shape, -1), experts_TK, num_experts, dtype)
        if wanted[1]:
            found[1] = weight_grad(grad.pre_SP, inputs_TD, left_by_token=False, right_by_token=True, **by_expert)
        if wanted[2]:
            found[2] = weight_grad(grad_TD, grad.hidden_SF, left_by_token=True, right_by_token=False, **by_expert)
        if wanted[4]:
            found[3] = bias_grad(grad.pre_SP, routing, num_experts)
        return found[0], found[1], found[2], grad.gates_S.view_as(weights_TK).to(weights_TK.dtype), found[3]


@_backward.register_fake
def _(
    grad_TD: Tensor,
    inputs_TD: Tensor,
    up_EPD: Tensor,
    down_EDF: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    bias_EP: Tensor | None,
    pre_SP: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (inputs_TD, up_EPD, down_EDF, weights_TK, bias_EP)
    needed = (*wanted[:3], True, wanted[4])
    found = [
        torch.empty_like(tensor) if is_needed and tensor is not None else inputs_TD.new_empty(0)
        for tensor, is_needed in zip(tensors, needed, strict=True)
    ]
    return found[0], found[1], found[2], found[3], found[4]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad_TD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[index] for index in (0, 1, 2, 4, 5)]
    found = torch.ops.moeify.moe_ffn_backward(grad_TD.contiguous(), *ctx.saved_tensors, ctx.activation, wanted)
    inputs, ups, downs, weights, biases = (grad if needed else None for grad, needed in zip(found, wanted, strict=True))
    return inputs, ups, downs, None, weights, biases, None, None


_training.register_autograd(_differentiate, setup_context=_keep)
