"""The kernels as an implementation of transformers' experts interface, for every architecture that uses it.

On a CUDA device that is Triton's, on a CPU plain torch (cpu.py).

    register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moeify")

What the kernels do not support runs on transformers' own implementation, and one line in the log says why.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers.activations
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.integrations import moe

from moeify.kernels.cpu import moe_ffn_cpu

NAME = "moeify"
# The Triton kernels on a CPU, in Triton's interpreter: for tests, where TRITON_INTERPRET was set before.
INTERPRET = False
# Copies into shared memory move at least so much of a row at once; compiled for odd rows of 2-byte numbers, products
# spill up to 384 bytes of registers (tests/kernels/kernel_compiler.py --dim 770 --width 33).
ALIGNMENT_BYTES = 4
# transformers' grouped_mm needs rows of whole so many bytes, on every device.
GROUPED_ALIGNMENT_BYTES = 16
# What the kernels call each class that transformers takes for an activation.
ACTIVATION_TYPES: Mapping[type, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    **{
        type(transformers.activations.ACT2FN[theirs]): ours
        for theirs, ours in {
            "silu": "silu",
            "swish": "silu",
            "gelu": "gelu",
            "gelu_pytorch_tanh": "gelu_tanh",
            "gelu_new": "gelu_tanh",
            "gelu_fast": "gelu_tanh",
            "gelu_accurate": "gelu_tanh",
            "quick_gelu": "gelu_quick",
            "relu": "relu",
            "relu2": "relu2",
        }.items()
    },
}

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

logger = logging.getLogger(__name__)
_said: set[str] = set()


def register() -> None:
    """Make `experts_implementation="moeify"` a valid choice; calling it again changes nothing."""
    if NAME not in moe.ALL_EXPERTS_FUNCTIONS:
        moe.ExpertsInterface.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an experts module.

    Args:
        self: a module decorated with transformers' use_experts_implementation.
        hidden_states: (T, D).
        top_k_index: (T, K) expert ids, int64; ids past the last expert add nothing.
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of hidden_states, or in autocast's where that is on.
    """
    device = hidden_states.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    reason = unsupported(self, hidden_states, autocast)
    if reason is not None:
        _say_once(f"{type(self).__name__}: {reason}")
        return _transformers_forward(self)(self, hidden_states, top_k_index, top_k_weights)
    up, down, bias = first_projection(self), self.down_proj, first_bias(self)
    if autocast is not None:
        hidden_states, up, down = hidden_states.to(autocast), up.to(autocast), down.to(autocast)
        bias = None if bias is None else bias.to(autocast)
    return operation(device)(
        hidden_states,
        up,
        down,
        top_k_index,
        top_k_weights,
        bias_EP=bias,
        activation=str(activation_name(self.act_fn)),
        gated=self.has_gate,
    )


def operation(device: str) -> Callable[..., Tensor]:
    """What computes a mixture of experts on a type of device."""
    if device == "cpu" and not INTERPRET:
        return moe_ffn_cpu
    # Triton need not be there where nothing runs on it.
    from moeify.kernels.ops import moe_ffn

    return moe_ffn


def unsupported(self: Any, hidden_states: Tensor, autocast: torch.dtype | None = None) -> str | None:
    """Why the kernels cannot run this module on these inputs; None if they can.

    Args:
        self: an experts module.
        hidden_states: its inputs.
        autocast: what inputs and weights are converted to before use.
    """
    weights = first_projection(self)
    reason = unsupported_module(self) or _unsupported_tensors(weights, hidden_states, autocast)
    if reason is not None or INTERPRET:
        return reason
    if hidden_states.device.type == "cpu":
        # How many tokens an expert gets decides what it runs.
        return "torch.compile takes no branches" if torch.compiler.is_compiling() else None
    if not _has_rows_of(self, ALIGNMENT_BYTES, autocast or weights.dtype):
        width = self.down_proj.shape[-1]
        return f"a hidden size of {hidden_states.shape[-1]} and a width of {width} are not both even"
    return None


def _has_rows_of(self: Any, num_bytes: int, dtype: torch.dtype) -> bool:
    """Whether rows of both projections are multiples of so many bytes in a dtype."""
    weights = (first_projection(self), self.down_proj)
    return all(weight.shape[-1] * dtype.itemsize % num_bytes == 0 for weight in weights)


def unsupported_module(self: Any) -> str | None:
    """Why the kernels cannot run an experts module, whatever its inputs; None if they can."""
    # Flags that an older transformers does not know describe what it does not do.
    refused = {
        "is_transposed": "its weights are stored transposed",
        "has_post_expert_norm": "it normalises what experts return",
    }
    for flag, reason in refused.items():
        if getattr(self, flag, False):
            return reason
    if not getattr(self, "is_concatenated", True):
        return "gate and up rows are interleaved"
    # moeify's own models say so: the bias of an FFN is added once there, not by expert.
    if getattr(self, "has_bias", False) and getattr(self, "has_down_bias", True):
        return "the outputs of its experts have biases"
    if self.has_gate and type(self)._apply_gate is not moe._default_apply_gate:
        return "it has a gating function of its own"
    if activation_name(self.act_fn) is None:
        return f"no kernel for the activation {getattr(self.act_fn, '__name__', type(self.act_fn).__name__)}"
    return None


def _unsupported_tensors(weights: Tensor, hidden_states: Tensor, autocast: torch.dtype | None) -> str | None:
    device, dtype = hidden_states.device.type, autocast or weights.dtype
    if device not in ("cuda", "cpu"):
        return f"the kernels need a CUDA device or a CPU, this is {device}"
    if isinstance(weights, DTensor):
        return "its weights are distributed tensors"
    if autocast is None and hidden_states.dtype != dtype:
        return f"inputs are {hidden_states.dtype}, weights {weights.dtype}"
    # Autocast leaves float64 alone. The interpreter multiplies the bit patterns of bfloat16 numbers.
    known = {"cuda": DTYPES, "cpu": (torch.float16, torch.float32) if INTERPRET else (*DTYPES, torch.float64)}[device]
    return next((f"no kernel for {needed}" for needed in (weights.dtype, dtype) if needed not in known), None)


def first_projection(self: Any) -> Tensor:
    """(E, 2F, D) gate and up rows, or (E, F, D) up rows alone."""
    weights: Tensor = self.gate_up_proj if self.has_gate else self.up_proj
    return weights


def first_bias(self: Any) -> Tensor | None:
    """(E, 2F) or (E, F): what is added to the rows of the first projection."""
    if not getattr(self, "has_bias", False):
        return None
    bias: Tensor = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
    return bias


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """What the kernels call a module's activation; None if they have none for it."""
    if function is functional.silu:
        return "silu"
    return ACTIVATION_TYPES.get(type(function))


def _transformers_forward(self: Any) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    # grouped_mm is what transformers takes by itself; what it refuses, only the module's own loop computes.
    dtype = first_projection(self).dtype
    if dtype in DTYPES and _has_rows_of(self, GROUPED_ALIGNMENT_BYTES, dtype):
        found: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = moe.grouped_mm_experts_forward
        return found
    forward: Any = type(self).forward
    return forward.__wrapped__  # type: ignore[no-any-return]


@torch.compiler.assume_constant_result
def _say_once(reason: str) -> None:
    # torch.compile runs this while it traces: a line in the log is nothing that a graph could hold.
    if reason in _said:
        return
    _said.add(reason)
    logger.warning("moeify's kernels do not run: %s; transformers' own implementation does", reason)
