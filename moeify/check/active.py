"""The share of its FFNs that a model really runs, where the number of experts is a token's own."""

from types import TracebackType
from typing import Any

import torch
from torch import nn

from moeify.modeling.modeling_moeify import MoeFFN, Router


class ActiveShare:
    """Counts the experts that routers choose while it is open; tells nothing of a model that gives every token as many.

    with ActiveShare(model) as active:
        model(ids)
    print(active.share)
    """

    def __init__(self, model: nn.Module) -> None:
        self._ffns = [module for module in model.modules() if isinstance(module, MoeFFN)]
        self._chosen = self._slots = 0
        self._handles: list[Any] = []

    @property
    def is_counted(self) -> bool:
        """Whether tokens have numbers of experts of their own."""
        return any(ffn.router.min_chosen is not None for ffn in self._ffns)

    @property
    def num_chosen(self) -> float:
        """Routed experts of a token in one layer, in the mean."""
        return float(self._ffns[0].experts.num_experts) * self._chosen / self._slots

    def __enter__(self) -> "ActiveShare":
        routers = [ffn.router for ffn in self._ffns if ffn.router.min_chosen is not None]
        self._handles = [router.register_forward_hook(self._count) for router in routers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, router: Router, _: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        scores_TR, _weights_TK, chosen_TK = outputs
        self._chosen += int((chosen_TK < router.num_experts).sum())
        self._slots += scores_TR.numel()

    @property
    def share(self) -> float | None:
        """Of the neurons of FFNs that are cut, the mean over layers and tokens; None if that is the same for all."""
        if not self._slots:
            return None
        ffn = self._ffns[0]
        routed = ffn.experts.num_experts * ffn.experts.width
        shared = 0 if ffn.shared is None else ffn.shared.up_proj.out_features
        share: float = (shared + routed * self._chosen / self._slots) / (shared + routed)
        return share
