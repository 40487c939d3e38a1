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
        ffns = [module for module in model.modules() if isinstance(module, MoeFFN)]
        self._counted = [ffn for ffn in ffns if ffn.router is not None and ffn.router.min_chosen is not None]
        self._active = self._neurons = self._chosen = self._tokens = 0
        self._handles: list[Any] = []

    @property
    def is_counted(self) -> bool:
        """Whether tokens have numbers of experts of their own."""
        return bool(self._counted)

    def __enter__(self) -> "ActiveShare":
        for ffn in self._counted:
            assert ffn.router is not None
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
        num_chosen = int((chosen_TK < router.num_experts).sum())
        self._chosen, self._tokens = self._chosen + num_chosen, self._tokens + len(scores_TR)
        self._active += shared + ffn.experts.width * num_chosen
        self._neurons += shared + ffn.experts.width * scores_TR.numel()

    @property
    def share(self) -> float | None:
        """Of the neurons of FFNs with experts, the mean over layers and tokens; None if that is the same for all."""
        return self._active / self._neurons if self._neurons else None

    @property
    def num_chosen(self) -> float:
        """Routed experts of a token in one layer, in the mean over layers and tokens."""
        return self._chosen / self._tokens
