"""A conversion tried out in memory: fitted on calibration tokens and evaluated on others in one walk through the model.

Nothing is written, so what no native checkpoint can hold (a neuron oracle, an MLP router) can be measured all the same.

Legend: T tokens, D hidden size, B blocks of C tokens, L losses a block: C - 1 of a language model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from moeify import partition
from moeify.calibration.gradients import output_gradients
from moeify.calibration.stream import HiddenStream
from moeify.convert.layer import fit_layer
from moeify.convert.output_change import PERPLEXITY, changes_of, measure_of
from moeify.convert.prepare import Prepared
from moeify.convert.walk import CalibrationWalk
from moeify.models.ffn import FFNWeights
from moeify.models.inputs import Inputs, named, num_blocks

# Fitted to one layer's calibration inputs, it gives what takes the dense FFN's place.
Control = Callable[[FFNWeights, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Trial:
    """The result of one conversion.

    Args:
        losses_BL: negative log-likelihood in nats of every evaluation token but the first of each block; of other
            models the change of their outputs (convert/output_change.py).
        diagnostics: means over layers of what the fits measured.
        aside_BL: losses of the further blocks, if there are any.
    """

    losses_BL: Tensor
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    aside_BL: Tensor | None = None


class Trials:
    """Tries conversions of one model on the same tokens.

    Args:
        dense: the model, prepared in any way.
        calibration, evaluation: its inputs; a tensor is ids_BC of text.
        aside_BC: ids of further text in blocks of another length, evaluated as well.
    """

    def __init__(
        self,
        dense: Prepared,
        calibration: Tensor | Inputs,
        evaluation: Tensor | Inputs,
        aside_BC: Tensor | None = None,
    ) -> None:
        self._dense, self._calibration, self._evaluation = dense, named(calibration), named(evaluation)
        self._aside_BC = aside_BC
        self._gradients: list[Tensor] = []

    @property
    def num_neurons(self) -> int:
        """Of a dense FFN."""
        return self._dense.dense.num_neurons

    def control(self, control: Control) -> Trial:
        """Every FFN replaced by a control."""
        walk = CalibrationWalk(self._dense, self._calibration, self._evaluation, aside_BC=self._aside_BC)
        for layer in range(self._dense.dense.num_layers):
            stage = walk.enter(layer)
            walk.leave(control(stage.ffn, stage.inputs_TD)(torch.cat([stage.inputs_TD, stage.riding_ED])))
        return Trial(self._losses(walk), aside_BL=self._aside(walk))

    def split(self, prepared: Prepared) -> Trial:
        """A split as it would be written."""
        fit, wants_gradients = prepared.fit(), partition.needs_gradients(prepared.options.partition)
        if wants_gradients and not self._gradients:
            self._gradients = output_gradients(prepared.dense, self._calibration, prepared.options.device)
        gradients = self._gradients if wants_gradients else []
        walk = CalibrationWalk(
            prepared, self._calibration, self._evaluation, aside_BC=self._aside_BC, gradients=gradients
        )
        measured: list[Mapping[str, float]] = []
        for layer in range(prepared.dense.num_layers):
            stage = walk.enter(layer)
            converted, fitted_TD = fit_layer(
                stage.ffn, stage.inputs_TD, fit, gradient_GD=stage.gradient_GD, goal_TD=stage.goal_TD
            )
            walk.leave(fitted_TD, converted(stage.riding_ED))
            measured.append(converted.plan.diagnostics)
        names = sorted({name for diagnostics in measured for name in diagnostics})
        means = {name: _mean([diagnostics[name] for diagnostics in measured if name in diagnostics]) for name in names}
        return Trial(self._losses(walk), means, self._aside(walk))

    def _losses(self, walk: CalibrationWalk) -> Tensor:
        config = self._dense.dense.config
        if measure_of(config) == PERPLEXITY:
            return walk.stream.losses(self._evaluation["input_ids"])
        return torch.stack(list(changes_of(walk.stream, self._end, num_blocks(self._evaluation), config)))

    @cached_property
    def _end(self) -> HiddenStream:
        """The dense model behind its last layer."""
        stream = self._dense.stream(self._evaluation)
        for layer in range(self._dense.dense.num_layers):
            stream.pass_through(layer, self._dense.ffn(layer))
        return stream

    def _aside(self, walk: CalibrationWalk) -> Tensor | None:
        return None if walk.aside is None or self._aside_BC is None else walk.aside.losses(self._aside_BC)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
