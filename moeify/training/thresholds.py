"""Thresholds after training: what they are compared with has moved, and with it how many experts a token gets.

SmolLM2-135M, 48 of 96 experts in the mean, distilled on 32,768 tokens: on five unseen texts 51.5 % of the FFNs ran
behind it, 49.7 % before. Settled by 8,192 tokens to the layout's number it was 47.9 %, to what these tokens had before
training 49.2 % (2 cores of an Intel Xeon, 2026-11-26).

Legend: T tokens, R routed experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moeify.check.features import on_device
from moeify.experts.mixing import above_threshold, common_shift
from moeify.layout import Layout
from moeify.models.inputs import Inputs, uncached
from moeify.training.model import Student

# Twice through the student; as many before and behind training, so that few do.
THRESHOLD_TOKENS = 4096


class Thresholds:
    """Those of a student, and how many experts its tokens have as it is when this is made.

    Args:
        student: where a token has as many experts as have higher scores.
        inputs: of the model, of text that it is trained on.
        half: its arithmetic is bfloat16.
    """

    def __init__(self, student: Student, inputs: Inputs, *, half: bool) -> None:
        self._student, self._inputs, self._half = student, inputs, half
        self._numbers: dict[int, float] = {}
        self._pass(student.model.base_model, self._count)

    def settle(self, model: Any) -> None:
        """Move those of each layer by one number so that tokens have as many experts as they had, in the mean.

        One layer after the other in the same pass, so that each sees what the layers before give now.

        Args:
            model: the student's, or the part of it below its head.
        """
        self._pass(model, self._move)

    def _count(self, layer: int, router: Any, above_TR: Tensor) -> None:  # noqa: ARG002
        self._numbers[layer] = _mean(above_TR, self._layout(layer))

    def _move(self, layer: int, router: Any, above_TR: Tensor) -> None:
        own = self._layout(layer)
        most = float(above_TR.abs().max())
        router.threshold += common_shift(lambda shift: _mean(above_TR - shift, own), most, self._numbers[layer])

    def _layout(self, layer: int) -> Layout:
        assert self._student.plan is not None
        return self._student.plan.layout.of_layer(layer)

    @torch.no_grad()
    def _pass(self, model: Any, look: Callable[[int, Any, Tensor], None]) -> None:
        """Have a look at the scores of every layer, before it chooses by them."""
        student = self._student

        def hook(layer: int) -> Callable[[Any, tuple[Any, ...]], None]:
            # Scores of such a router are relative to its thresholds.
            return lambda router, arguments: look(layer, router, router.forward(arguments[0])[0].float())

        pairs = zip(student.routed_layers, student.routers, strict=True)
        handles = [router.register_forward_pre_hook(hook(layer)) for layer, router in pairs]
        was_training = model.training
        model.train(mode=False)
        try:
            with torch.autocast(student.model.device.type, torch.bfloat16, enabled=self._half):
                model(**on_device(self._inputs, student.model), **uncached(model))
        finally:
            for handle in handles:
                handle.remove()
            model.train(mode=was_training)


def _mean(above_TR: Tensor, layout: Layout) -> float:
    """Routed experts of a token."""
    return float(above_threshold(above_TR, layout).sum()) / len(above_TR)
