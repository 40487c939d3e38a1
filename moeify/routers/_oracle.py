"""What a router that saw the experts' outputs would choose, and gradient descent towards it.

Legend: T tokens, R routed experts, K of them chosen for a token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moeify.experts.mixing import choose_experts
from moeify.routers import RoutingTask

BATCH_TOKENS = 512


def membership(task: RoutingTask) -> Tensor:
    """member_TR in the dtype of the inputs: one for the K experts that add most to a token's output."""
    return choose_experts(task.norms_TR, task.layout).to(task.inputs_TD.dtype)


def descend(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    num_tokens: int,
    *,
    rate: float,
    steps: int,
    seed: int,
) -> None:
    """AdamW in place on random minibatches, the rate falling linearly to zero; `loss` takes token numbers."""
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
            optimizer.step()
    for parameter in parameters:
        parameter.requires_grad = False
