"""Through the model, layer by layer, with everything that the fit of a layer is given.

    walk = CalibrationWalk(prepared, calibration inputs)
    for layer in range(num_layers):
        stage = walk.enter(layer)
        walk.leave(outputs of the converted FFN)

Legend: T calibration tokens, E tokens that ride along, G tokens with gradients, D hidden size, B blocks of C tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.calibration.activations import Activations
from moeify.calibration.store import IN_MEMORY, Store, stretches, widened
from moeify.convert.prepare import Prepared
from moeify.errors import UsageError
from moeify.models.ffn import FFNWeights
from moeify.models.inputs import Inputs, named, num_blocks, one_behind_other


@dataclass(frozen=True)
class LayerInputs:
    """One layer.

    Args:
        ffn: its dense FFN.
        inputs_TD: what that sees on the calibration tokens.
        riding_ED: the same for tokens that nothing is fitted to.
        gradient_GD: the loss's gradient by its output, if the method asks for it.
        goal_TD: outputs that the refit aims for, if not those of the dense FFN on these inputs.
    """

    ffn: FFNWeights
    inputs_TD: Tensor
    riding_ED: Tensor
    gradient_GD: Tensor | None
    goal_TD: Tensor | None


class CalibrationWalk:
    """Each layer sees what the converted layers before it really give.

    Args:
        prepared: the model, and what its options ask for.
        calibration: the inputs that layers are fitted to; a tensor is ids_BC of text.
        riding: inputs that are only taken along.
        aside_BC: the same of text in blocks of another length; it rides behind the others.
        gradients: gradient_GD of every layer, for methods that need them.
        store: holds what is as long as the text.
    """

    def __init__(
        self,
        prepared: Prepared,
        calibration: Tensor | Inputs,
        riding: Tensor | Inputs | None = None,
        *,
        aside_BC: Tensor | None = None,
        gradients: Sequence[Tensor] = (),
        store: Store = IN_MEMORY,
    ) -> None:
        fitted = named(calibration)
        whole = fitted if riding is None else one_behind_other(fitted, named(riding))
        self._prepared, self._gradients, self._store = prepared, gradients, store
        self.stream = prepared.stream(whole, store)
        self._fit_blocks = num_blocks(fitted)
        self.aside = None if aside_BC is None else prepared.stream(aside_BC, store)
        self._undisturbed = prepared.stream(fitted, store) if prepared.options.refit_to == "stream" else None

    def enter(self, layer: int) -> LayerInputs:
        """Go through the layer's attention; `leave` must follow."""
        inputs_TD = self.stream.attend(layer)
        ffn, goal_TD = self._prepared.ffn(layer), None
        if self._undisturbed is not None:
            if not self.stream.adds_up:
                raise UsageError(
                    f"{self._prepared.dense.config.model_type} changes the output of an FFN before it adds it to the "
                    "residual stream, so no output brings the stream back",
                    "--refit-to ffn works for every model",
                )
            goal_TD = self._missing(self._undisturbed.pass_through(layer, self._dense(ffn)))
        gradient_GD = self._gradients[layer] if self._gradients else None
        # A decoder's blocks have another number of tokens than its encoder's.
        num_fit = self._fit_blocks * self.stream.block_tokens
        riding_ED = inputs_TD[num_fit:]
        if self.aside is not None:
            riding_ED = torch.cat([riding_ED, self.aside.attend(layer)])
        return LayerInputs(ffn, inputs_TD[:num_fit], riding_ED, gradient_GD, goal_TD)

    def _dense(self, ffn: FFNWeights) -> Callable[[Tensor], Tensor]:
        """The FFN on inputs that the store holds."""
        return lambda inputs_TD: Activations(ffn, inputs_TD, 0).outputs(ffn.down_DF, self._store, ffn.down_bias_D)

    def _missing(self, goal_TD: Tensor) -> Tensor:
        """What the stream lacks of another one, on the tokens that layers are fitted to."""
        residual_TD, device = self.stream.residual(), torch.device(self._prepared.options.device)
        parts = (
            widened(goal_TD, rows, device) - widened(residual_TD, rows, device) for rows in stretches(len(goal_TD))
        )
        return self._store.collect(parts, len(goal_TD))

    def leave(self, outputs_TD: Tensor, riding_ED: Tensor | None = None) -> None:
        """Add what the FFN gives, for all tokens."""
        whole_TD = outputs_TD if riding_ED is None else torch.cat([outputs_TD, riding_ED])
        num_tokens = len(self.stream.residual())
        self.stream.advance(whole_TD[:num_tokens])
        if self.aside is not None:
            self.aside.advance(whole_TD[num_tokens:])
