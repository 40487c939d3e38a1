"""Kernels for the feed-forward part of mixture-of-experts models: Triton's, and cpu.py in plain torch.

    route      which rows go to which expert (routing.py)
      |
    up         gather, one or two matrix products, activation (up.py)
      |
    matmul     back to the hidden size, scaled by the router's weight (matmul.py)
      |
    combine    the experts of a token, summed in fixed order (combine.py)

backward.py leads the same road back; decode.py is the short cut for few tokens, single.py for one. ops.py joins the
pieces for autograd and torch.compile, experts.py hands them to transformers, launch.py says which tiles they run with,
and reference.py is the truth in plain torch that is never fast.

Tensor names in these files end in their shape:
    T  tokens                   D  hidden size
    K  experts of a token       F  width of an expert
    S  slots, T * K             P  rows of an expert's first projection: 2 * F ([gate ; up]) or F
    E  experts
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeify.kernels.experts import register as register
    from moeify.kernels.ops import moe_ffn as moe_ffn

__all__ = ["moe_ffn", "register"]


def __getattr__(name: str) -> object:
    # Importing the package costs nothing: triton comes in with the first use.
    if name == "register":
        from moeify.kernels.experts import register

        return register
    if name == "moe_ffn":
        from moeify.kernels.ops import moe_ffn

        return moe_ffn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
