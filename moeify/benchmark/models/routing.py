"""Which experts tokens chose, noted at the door of the experts themselves, so that it is what really ran.

Legend: T tokens, D what experts take in, K experts of a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeify.benchmark.models.anatomy import experts_modules

# (layer, experts module, inputs_TD, chosen_TK)
See = Callable[[int, Any, Tensor, Tensor], None]


@contextmanager
def watching(model: nn.Module, see: See) -> Iterator[None]:
    """Call `see` before the experts of every layer run."""

    def hook(layer: int) -> Any:
        def look(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            # Not all models pass them by position.
            inputs = dict(zip(("hidden_states", "top_k_index"), arguments, strict=False)) | named
            see(layer, module, inputs["hidden_states"].detach(), inputs["top_k_index"].detach())

        return look

    handles = [
        module.register_forward_pre_hook(hook(layer), with_kwargs=True)
        for layer, module in experts_modules(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class ExpertsHit:
    """Share of the routed experts that at least one token of a pass chose, mean over layers."""

    def __init__(self) -> None:
        self._shares: list[float] = []

    def see(self, _layer: int, module: Any, _inputs_TD: Tensor, chosen_TK: Tensor) -> None:
        num_experts = int(next(module.parameters()).shape[0])
        # Where the number of experts is a token's own, places that it leaves empty hold what is no expert's number.
        self._shares.append(int(torch.unique(chosen_TK[chosen_TK < num_experts]).numel()) / num_experts)

    @property
    def share(self) -> float | None:
        """None if there were no experts."""
        return sum(self._shares) / len(self._shares) if self._shares else None
