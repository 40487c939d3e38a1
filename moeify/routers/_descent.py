"""Gradient descent for routers that are trained rather than solved for."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeify.calibration.share import ALONE, Share

BATCH_TOKENS = 512


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    num_tokens: int,
    *,
    rate: float,
    steps: int,
    seed: int,
    share: Share = ALONE,
) -> None:
    """AdamW in place on random minibatches, the rate falling linearly to zero; `loss` takes token numbers.

    Where processes share the tokens, the numbers are of all of them, and each one's loss is of its own among these.
    """
    device = parameters[0].device
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad = True
        optimizer = torch.optim.AdamW(parameters)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            batch = torch.randint(num_tokens, (min(BATCH_TOKENS, num_tokens),), generator=generator)
            loss(batch.to(device)).backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    share.sum(parameter.grad)
            optimizer.step()
    for parameter in parameters:
        parameter.requires_grad = False
