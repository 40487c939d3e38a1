"""Whether what the model computes on a text can be computed with: finite, and small enough to be squared and summed.

Weights that are finite one by one may still overflow together, and a config may turn anything into NaN (rope_theta 0,
an epsilon of NaN). It is said here, with the place, before a method meets such numbers.
"""

import math

from torch import Tensor

from moeify.errors import InputError

# Methods add up squares over tokens: of 1e15 that is 1e30 a token, and float32 ends at 3.4e38. The massive activations
# of trained models (https://arxiv.org/abs/2402.17762) reach 1e4.
LARGEST = 1e15


def check_activations(values: Tensor, what: str, largest: float = LARGEST) -> None:
    """Refuse numbers that nothing can be computed from.

    Args:
        values: any shape.
        what: they are, and where, such as `layer 3: the hidden states`.
        largest: allowed size.

    Raises:
        InputError: some are NaN, infinite, or larger than allowed.
    """
    if not values.numel():
        return
    low, high = (float(end) for end in values.aminmax())
    reach = max(-low, high)
    # NaN shows in both ends.
    if math.isnan(reach) or math.isinf(reach):
        bad = values.numel() - int(values.isfinite().sum())
        found = f"are not finite on this text ({bad:,} of {values.numel():,} are NaN or infinite)"
    elif reach > largest:
        found = f"reach {reach:.1e} on this text, expected at most {largest:.0e}, whose squares float32 can add up"
    else:
        return
    raise InputError(
        f"{what} {found}",
        "a weight, rope_theta or an epsilon of this model is far out of range: compare its config.json and weights "
        "with the original, and see what transformers itself computes with it",
    )
