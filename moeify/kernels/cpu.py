"""A mixture of experts on a CPU, in plain torch: three ways, of which the sizes choose one.

transformers' own implementations copy each token once for each of its experts, which costs more than it saves where
experts are narrow, or copy the weights of all chosen experts. Time over that of a dense FFN of 1,536 neurons, hidden
size 576, cut into 8 slices of which one is shared and 3 of 7 run, or 32, of which 4 are shared and 12 of 28 run:

    tokens                     1      8     32    512   2048
    8 slices, ours          0.88   1.19   1.20   0.72   0.47
    8 slices, grouped_mm    1.58   1.49   1.33   0.88   0.87
    8 slices, eager         1.70   2.03   1.82   0.87   0.61
    32 slices, ours         1.20   1.19   1.29   1.18   0.87
    32 slices, grouped_mm   1.90   1.97   2.03   2.78   3.06
    32 slices, eager        3.66   5.16   4.18   1.86   1.37

(float32, 2 cores of an Intel Xeon, PyTorch 2.13, transformers 5.23, 2026-11-22: python -m moeify.benchmark.layers
--cases 576x1536-8/1+3,576x1536-32/4+12 --tokens 1,8,32,512,2048 --routings uniform --device cpu). Training, 2,048
tokens: 0.69 and 1.06, grouped_mm 0.93 and 2.79. From 8 to 32 tokens all experts are hit, so that nothing can be saved.

Shapes: see the package.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeify.kernels.reference import ACTIVATIONS

# Where one way overtakes another on 7 experts of 192 and 28 of 48 neurons, hidden size 576, 1 to 2,048 tokens (1 and 2
# threads of an Intel Xeon with AMX, PyTorch 2.13, 2026-11-22), by the bytes of a number. One expert after the other
# pays if each has so many tokens times neurons; else all experts are computed for all tokens, and what was not chosen
# is multiplied with zero: a few large products. float64 was not measured.
MIN_WORK = {2: 1 << 16, 4: 1 << 12, 8: 1 << 10}
# The same for the width of an expert that a single token has chosen.
MIN_WIDTH = {2: 128, 4: 1, 8: 1}
# So many times the weights that were asked for are read at most, and more than so many times the work counts double.
MAX_WASTE = 3
# What copying a token to an expert and its output back costs, in neurons of an expert: where experts are narrow that is
# more than what is computed in vain if all are computed. Time of one after the other over that of all together, 36 and
# 60 of 84 experts of 16 neurons, 2,048 tokens, hidden size 576, float32, training: 1.37 and 2.22, which is 35 and 34
# neurons; 19 to 42 from 7 experts of 192 neurons to 84 of 16, 64 to 2,048 tokens, hidden size 256 to 2,048, forward
# alone and training (one core of an AMD EPYC 7003, PyTorch 2.13, 2026-11-26). bfloat16: 27 of 87 experts of 16 neurons
# take 101 ms and 33 ms, which is 142 (an Intel Xeon with AMX, 2026-11-26). float64 was not measured.
COPY_WIDTH = {2: 128, 4: 32, 8: 32}
# Below so many tokens a batch of small products beats one large one with few columns (float32).
FEW_TOKENS = 32
# Copied tokens that are worked on at once; they should stay in the cache.
GROUP_BYTES = 1 << 22


class _Call(NamedTuple):
    """What `moe_ffn_cpu` was asked."""

    inputs_TD: Tensor
    up_EPD: Tensor
    down_EDF: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    bias_EP: Tensor | None
    activation: str
    gated: bool


def moe_ffn_cpu(
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
    """The sum over a token's experts of weight * down(act(gate) * up); differentiable.

    Args:
        inputs_TD: on a CPU, any floating dtype.
        up_EPD: rows [gate ; up] of each expert, or its up projection alone where nothing is gated; of the same dtype.
        down_EDF: the second projection; of the same dtype.
        experts_TK: int64; an id of E or more names no expert and adds nothing.
        weights_TK: what each expert's output is multiplied with; any floating dtype.
        bias_EP: added to the rows of up_EPD's products, if it is there; of the same dtype.
        activation: a key of ACTIVATIONS.
        gated: whether the first half of up_EPD gates the second.

    Returns:
        (T, D), in the dtype of inputs_TD.
    """
    (num_tokens, num_ranks), (num_experts, _, width) = experts_TK.shape, down_EDF.shape
    size = inputs_TD.element_size()
    call = _Call(inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK.to(inputs_TD.dtype), bias_EP, activation, gated)
    training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in call[:6])
    # Weights that no token needs are not read, but for a few.
    all_pays = num_tokens == 0 or num_experts <= MAX_WASTE * min(num_experts, num_tokens * num_ranks)
    if num_tokens == 1 and not training and not (all_pays and width < MIN_WIDTH[size]):
        return _one_token(call)
    # A token may have fewer experts than there are ranks for.
    num_chosen = int((experts_TK < num_experts).sum())
    waste = max(1.0, num_experts * num_tokens / (MAX_WASTE * max(1, num_chosen)))
    is_little = waste * num_chosen * width < MIN_WORK[size] * num_experts
    is_copying = num_experts * num_tokens * width < num_chosen * (width + COPY_WIDTH[size])
    if all_pays and (is_little or is_copying):
        return _all_experts(call)
    if not training:
        return _one_by_one(call)
    out_TD: Tensor = _OneByOne.apply(*call)  # type: ignore[no-untyped-call]
    return out_TD


def _activated(pre_SP: Tensor, activation: str, gated: bool) -> Tensor:
    """hidden_SF of pre-activations."""
    if not gated:
        return ACTIVATIONS[activation](pre_SP)
    gate_SF, up_SF = pre_SP.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate_SF) * up_SF


def _one_token(call: _Call) -> Tensor:
    """Products of matrix and vector, of the chosen experts alone: their weights are read once, and no others."""
    inputs_1D, up_EPD, down_EDF, experts_1K, weights_1K, bias_EP, activation, gated = call
    chosen = [(rank, expert) for rank, expert in enumerate(experts_1K[0].tolist()) if expert < len(up_EPD)]
    pre_KP = inputs_1D.new_zeros(experts_1K.shape[1], up_EPD.shape[1])
    for rank, expert in chosen:
        torch.mv(up_EPD[expert], inputs_1D[0], out=pre_KP[rank])
        if bias_EP is not None:
            pre_KP[rank] += bias_EP[expert]
    hidden_KF = _activated(pre_KP, activation, gated) * weights_1K[0, :, None]
    out_D = inputs_1D.new_zeros(inputs_1D.shape[1])
    for rank, expert in chosen:
        out_D.addmv_(down_EDF[expert], hidden_KF[rank])
    return out_D[None]


def _all_experts(call: _Call) -> Tensor:
    """All experts for all tokens. Tokens come last, so that whatever is done to activations runs through memory."""
    inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK, bias_EP, activation, gated = call
    num_experts, dim, width = down_EDF.shape
    # Ids past the last expert fall into a column that is left out.
    chosen_TK = experts_TK.clamp(max=num_experts)
    weights_TE = weights_TK.new_zeros(len(inputs_TD), num_experts + 1).scatter_add(1, chosen_TK, weights_TK)
    weights_E1T = weights_TE[:, :num_experts].T[:, None]
    if len(inputs_TD) < FEW_TOKENS and inputs_TD.element_size() > 2:
        pre_ETP = inputs_TD.expand(num_experts, -1, -1) @ up_EPD.transpose(1, 2)
        if bias_EP is not None:
            pre_ETP = pre_ETP + bias_EP[:, None]
        hidden_ETF = _activated(pre_ETP, activation, gated) * weights_E1T.transpose(1, 2)
        return (hidden_ETF @ down_EDF.transpose(1, 2)).sum(dim=0)
    pre_EPT = (up_EPD.flatten(0, 1) @ inputs_TD.T).view(num_experts, -1, len(inputs_TD))
    if bias_EP is not None:
        pre_EPT = pre_EPT + bias_EP[:, :, None]
    parts_EFT = pre_EPT.split(width, dim=1)
    hidden_EFT = ACTIVATIONS[activation](parts_EFT[0])
    hidden_EFT = (hidden_EFT * parts_EFT[1] if gated else hidden_EFT) * weights_E1T
    return (down_EDF.transpose(0, 1).reshape(dim, -1) @ hidden_EFT.flatten(0, 1)).T


class _Sorted:
    """Slots in the order of their experts, and groups of experts whose tokens fit the cache together.

    Legend: N slots of a group.
    """

    def __init__(self, experts_TK: Tensor, num_experts: int, token_bytes: int) -> None:
        num_ranks = experts_TK.shape[1]
        self.slot_S = experts_TK.flatten().argsort(stable=True)
        self.token_S = self.slot_S // num_ranks
        self.counts = torch.bincount(experts_TK.flatten(), minlength=num_experts)[:num_experts].tolist()
        self._most = max(1, GROUP_BYTES // token_bytes)

    def __iter__(self) -> Iterator[tuple[slice, list[int], list[int]]]:
        """(rows, experts, number of slots of each)."""
        start, group, sizes = 0, list[int](), list[int]()
        for expert, count in enumerate(self.counts):
            if group and sum(sizes) + count > self._most:
                yield slice(start, start + sum(sizes)), group, sizes
                start, group, sizes = start + sum(sizes), [], []
            if count:
                group.append(expert)
                sizes.append(count)
        if group:
            yield slice(start, start + sum(sizes)), group, sizes


def _multiply(rows_NX: Tensor, weights_EXY: Tensor, experts: list[int], sizes: list[int], *, out: Tensor) -> None:
    """out_NY: each expert's rows times its matrix."""
    for expert, some_NX, some_NY in zip(experts, rows_NX.split(sizes), out.split(sizes), strict=True):
        torch.mm(some_NX, weights_EXY[expert], out=some_NY)


def _outer(left_NX: Tensor, right_NY: Tensor, experts: list[int], sizes: list[int], *, out: Tensor) -> None:
    """out_EXY: sums over each expert's rows."""
    for expert, some_NX, some_NY in zip(experts, left_NX.split(sizes), right_NY.split(sizes), strict=True):
        torch.mm(some_NX.T, some_NY, out=out[expert])


def _one_by_one(call: _Call, keep_SP: Tensor | None = None) -> Tensor:
    """The tokens of one expert after the other; pre-activations go to `keep_SP`, sorted by expert, if it is there."""
    inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK, bias_EP, activation, gated = call
    slots = _Sorted(experts_TK, len(up_EPD), inputs_TD[:1].nbytes)
    weights_S = weights_TK.flatten()
    # Halves would be rounded at every expert.
    out_TD = torch.zeros_like(inputs_TD, dtype=torch.promote_types(inputs_TD.dtype, torch.float32))
    for rows, experts, sizes in slots:
        token_N = slots.token_S[rows]
        rows_ND = inputs_TD.index_select(0, token_N)
        pre_NP = rows_ND.new_empty(len(token_N), up_EPD.shape[1]) if keep_SP is None else keep_SP[rows]
        _multiply(rows_ND, up_EPD.transpose(1, 2), experts, sizes, out=pre_NP)
        if bias_EP is not None:
            pre_NP += bias_EP[experts].repeat_interleave(torch.tensor(sizes), dim=0)
        hidden_NF = _activated(pre_NP, activation, gated)
        hidden_NF *= weights_S.index_select(0, slots.slot_S[rows])[:, None]
        _multiply(hidden_NF, down_EDF.transpose(1, 2), experts, sizes, out=rows_ND)
        out_TD.index_add_(0, token_N, rows_ND.to(out_TD.dtype))
    return out_TD.to(inputs_TD.dtype)


class _OneByOne(torch.autograd.Function):
    """`_one_by_one` and its gradient, which goes the same way; activations are computed again from what was kept."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = _Call(*arguments)
        pre_SP = call.inputs_TD.new_empty(call.experts_TK.numel(), call.up_EPD.shape[1])
        ctx.save_for_backward(*call[:6], pre_SP)
        ctx.activation, ctx.gated = call.activation, call.gated
        return _one_by_one(call, pre_SP)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs_TD, up_EPD, down_EDF, experts_TK, weights_TK, bias_EP, pre_SP = ctx.saved_tensors
        slots = _Sorted(experts_TK, len(up_EPD), inputs_TD[:1].nbytes)
        weights_S, grad_weights_S = weights_TK.flatten(), torch.zeros_like(weights_TK.flatten())
        wanted = ctx.needs_input_grad
        out = torch.promote_types(inputs_TD.dtype, torch.float32)
        grad_inputs_TD = torch.zeros_like(inputs_TD, dtype=out) if wanted[0] else None
        grad_up_EPD = torch.zeros_like(up_EPD) if wanted[1] else None
        grad_down_EDF = torch.zeros_like(down_EDF) if wanted[2] else None
        grad_bias_EP = torch.zeros_like(bias_EP) if wanted[5] else None
        for rows, experts, sizes in slots:
            token_N, slot_N = slots.token_S[rows], slots.slot_S[rows]
            grad_ND = grads[0].index_select(0, token_N)
            weights_N1 = weights_S.index_select(0, slot_N)[:, None]
            pre_NP = pre_SP[rows].detach().requires_grad_()
            with torch.enable_grad():
                hidden_NF = _activated(pre_NP, ctx.activation, ctx.gated)
            grad_NF = torch.empty_like(hidden_NF)
            _multiply(grad_ND, down_EDF, experts, sizes, out=grad_NF)
            (grad_NP,) = torch.autograd.grad(hidden_NF, pre_NP, grad_NF * weights_N1)
            hidden_NF = hidden_NF.detach()
            grad_weights_S[slot_N] = (grad_NF * hidden_NF).sum(dim=-1)
            if grad_down_EDF is not None:
                _outer(grad_ND, hidden_NF * weights_N1, experts, sizes, out=grad_down_EDF)
            if grad_up_EPD is not None:
                _outer(grad_NP, inputs_TD.index_select(0, token_N), experts, sizes, out=grad_up_EPD)
            if grad_bias_EP is not None:
                for expert, some_NP in zip(experts, grad_NP.split(sizes), strict=True):
                    grad_bias_EP[expert] = some_NP.sum(dim=0)
            if grad_inputs_TD is not None:
                _multiply(grad_NP, up_EPD, experts, sizes, out=grad_ND)
                grad_inputs_TD.index_add_(0, token_N, grad_ND.to(out))
        if grad_inputs_TD is not None:
            grad_inputs_TD = grad_inputs_TD.to(inputs_TD.dtype)
        grad_weights_TK = grad_weights_S.view_as(weights_TK)
        return grad_inputs_TD, grad_up_EPD, grad_down_EDF, None, grad_weights_TK, grad_bias_EP, None, None
