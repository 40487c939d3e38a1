"""How the embedded models are trained: AdamW, a linear warmup, then a cosine down to zero."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from moeify.options import Track

CLIP_NORM = 1.0


class Schedule(Protocol):
    """What a recipe says of its training."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


def trained(
    recipe: Schedule,
    make: Callable[[], Any],
    loss: Callable[[Any, torch.Generator], Tensor],
    track: Track[Any],
    name: str,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Any:
    """Make a model and train it; bit-identical for the same recipe and number of threads.

    The caller's random state and thread count stay as they are.

    Args:
        recipe: how long, how fast.
        make: gives the model, with weights drawn from torch's random state.
        loss: of the model on a batch that is drawn by the generator.
        track: wraps the steps to show progress.
        name: the model's, for that.
        betas: of AdamW.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(recipe.seed)
        model = make().train()
        batches = torch.Generator().manual_seed(recipe.seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay, fused=True
        )
        for step in track(range(recipe.steps), f"training the built-in {name}", recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * share_of_rate(step, recipe.steps, recipe.warmup_steps)
            value = loss(model, batches)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
    return model.eval()


def share_of_rate(step: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate: linear warmup, then a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))
