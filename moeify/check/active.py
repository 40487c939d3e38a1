"""The share of its FFNs that a model really runs, where the number of experts is a token's own."""

from functools import partial
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
        self._active = self._neurons = 0
        self._handles: list[Any] = []

    def __enter__(self) -> "ActiveShare":
        for ffn in self._ffns:
            if ffn.router is not None and ffn.router.min_chosen is not None:
                self._handles.append(ffn.router.register_forward_hook(partial(self._count, ffn)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, ffn: MoeFFN, router: Router, _: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        scores_TR, _weights_TK, chosen_TK = outputs
        assert ffn.experts is not None
        shared = 0 if ffn.shared is None else len(scores_TR) * ffn.shared.up_proj.out_features
        self._active += shared + ffn.experts.width * int((chosen_TK < router.num_experts).sum())
        self._neurons += shared + ffn.experts.width * scores_TR.numel()

    @property
    def share(self) -> float | None:
        """Of the neurons of FFNs with experts, the mean over layers and tokens; None if that is the same for all."""
        return self._active / self._neurons if self._neurons else None
