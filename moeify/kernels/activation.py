"""Activation functions inside kernels, in float32.

Constants stand on the right of tensors: on the left the interpreter wraps the result as a constant.
"""

import triton
import triton.language as tl

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
SQRT_1_OVER_2 = tl.constexpr(0.7071067811865476)
ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)
GELU_CUBIC = tl.constexpr(0.044715)
QUICK_GELU = tl.constexpr(1.702)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation's value."""
    value, _ = activate_with_slope(x, ACTIVATION)
    return value


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """The activation's value and its derivative; the compiler drops the one that is not used."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        value = x * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * SQRT_1_OVER_2)
        value = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * ONE_OVER_SQRT_2_PI
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z).
        below = tl.sigmoid((x + x * x * x * GELU_CUBIC) * (2.0 * SQRT_2_OVER_PI))
        value = x * below
        slope = below + value * (1.0 - below) * (1.0 + x * x * (3.0 * GELU_CUBIC)) * (2.0 * SQRT_2_OVER_PI)
    elif ACTIVATION == "gelu_quick":
        below = tl.sigmoid(x * QUICK_GELU)
        value = x * below
        slope = below + value * (1.0 - below) * QUICK_GELU
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2", "unknown activation")
        positive = tl.maximum(x, 0.0)
        if ACTIVATION == "relu":
            value = positive
            slope = tl.where(x > 0.0, 1.0, 0.0)
        else:
            value = positive * positive
            slope = 2.0 * positive
    return value, slope
