"""A conversion tried out in memory: fitted on calibration tokens and evaluated on others in one walk through the model.

Nothing is written, so what no native checkpoint can hold (a neuron oracle, an MLP router) can be measured all the same.

Legend: T tokens, D hidden size, B blocks of C tokens, L = C - 1 losses a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeify import partition
from moeify.calibration import HiddenStream
from moeify.ffn import FFNWeights
from moeify.gradients import output_gradients
from moeify.layer import fit_layer
from moeify.prepare import Prepared

# Fitted to one layer's calibration inputs, it gives what takes the dense FFN's place.
Control = Callable[[FFNWeights, Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Trial:
    """What came of one.

    Args:
        losses_BL: negative log-likelihood in nats of every evaluation token but the first of each block.
        diagnostics: means over layers of what the fits measured.
    """

    losses_BL: Tensor
    diagnostics: Mapping[str, float] = field(default_factory=dict)


class Trials:
    """Tries conversions of one model on the same tokens.

    Args:
        dense: the model, prepared in any way.
        calibration_BC, evaluation_BC: blocks of token ids.
    """

    def __init__(self, dense: Prepared, calibration_BC: Tensor, evaluation_BC: Tensor) -> None:
        self._dense, self._evaluation_BC = dense, evaluation_BC
        self._ids_BC = torch.cat([calibration_BC, evaluation_BC])
        self._num_fit = calibration_BC.numel()
        self._gradients: list[Tensor] = []

    def control(self, control: Control) -> Trial:
        """Every FFN replaced by a control."""
        stream = self._stream()
        for layer in range(self._dense.dense.num_layers):
            inputs_TD = stream.attend(layer)
            stream.advance(control(self._dense.ffn(layer), inputs_TD[: self._num_fit])(inputs_TD))
        return Trial(stream.losses(self._evaluation_BC))

    def split(self, prepared: Prepared) -> Trial:
        """A split as it would be written."""
        fit, options, num_fit = prepared.fit(), prepared.options, self._num_fit
        stream, undisturbed = self._stream(), None
        if options.refit_to == "stream":
            undisturbed = HiddenStream(prepared.dense, self._ids_BC[: -len(self._evaluation_BC)], options.device)
        if partition.needs_gradients(options.partition) and not self._gradients:
            self._gradients = output_gradients(
                prepared.dense, self._ids_BC[: -len(self._evaluation_BC)], options.device
            )
        found: list[Mapping[str, float]] = []
        for layer in range(prepared.dense.num_layers):
            ffn, inputs_TD = prepared.ffn(layer), stream.attend(layer)
            converted, fitted_TD = fit_layer(
                ffn,
                inputs_TD[:num_fit],
                fit,
                gradient_GD=self._gradients[layer] if partition.needs_gradients(options.partition) else None,
                wanted_TD=undisturbed.pass_through(layer, ffn) - stream.residual()[:num_fit] if undisturbed else None,
            )
            stream.advance(torch.cat([fitted_TD, converted(inputs_TD[num_fit:])]))
            found.append(converted.plan.diagnostics)
        names = sorted({name for diagnostics in found for name in diagnostics})
        means = {name: _mean([diagnostics[name] for diagnostics in found if name in diagnostics]) for name in names}
        return Trial(stream.losses(self._evaluation_BC), means)

    def _stream(self) -> HiddenStream:
        return HiddenStream(self._dense.dense, self._ids_BC, self._dense.options.device)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
