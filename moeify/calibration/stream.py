"""Calibration hidden states walk through the model one block at a time; no more than one block is ever in memory.

    stream = HiddenStream(model, {"input_ids": ids_BC})
    for layer in range(num_layers):
        inputs_TD = stream.attend(layer)          # up to the FFN: what it would see
        stream.advance(converted_ffn(inputs_TD))  # the next block is calibrated on what this one really gives

Everything but the FFN is done by the stock model's own modules, so nothing is assumed of embeddings, norms, residuals
or heads. Where a block adds the FFN's output to its residual as it is, as llama does, attention runs once and `advance`
is an addition; where it does not (a norm behind the FFN, a factor on it), the block runs again with the output given.

Of a model with an encoder and a decoder the blocks are numbered through both: `attend` of the decoder's first block
leaves the encoder's hidden states, which every block of the decoder sees from then on, and enters the decoder's.

Legend: B blocks (texts, images) of C tokens, T = B * C tokens, D hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeify.calibration.blocks import Beside, Block, Call
from moeify.calibration.overflow import LARGEST, check_activations
from moeify.calibration.shell import DECODER, Shell, Source
from moeify.calibration.store import IN_MEMORY, Store, stretches
from moeify.models.ffn import CHUNK_TOKENS
from moeify.models.inputs import num_blocks, some_blocks


class HiddenStream:
    """Hidden states of the calibration text on their way through the model.

    Args:
        model: the model.
        inputs: what the stock model is called with, by name: tensors of B blocks, such as `input_ids` of C tokens each,
            or `pixel_values` of images that the model makes C tokens of; what a decoder is called with begins with
            `decoder_`.
        device: where the arithmetic runs.
        dtype: in which it runs; float32 unless there is a reason.
        store: holds the hidden states, and what the FFNs see of them.
    """

    def __init__(
        self,
        model: Source,
        inputs: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        store: Store = IN_MEMORY,
    ) -> None:
        lengths = [len(model.skeleton.get_submodule(sites.blocks)) for sites in model.sites]
        # Numbers of the first block of each list, and of the one behind the last.
        self._starts = [sum(lengths[:place]) for place in range(len(lengths) + 1)]
        # Which list of blocks the hidden states are in, and those that an encoder has given.
        self._place, self._encoded_BCD = 0, torch.empty(0)
        self._later = {name: tensor for name, tensor in inputs.items() if name.startswith(DECODER)}
        # What the block before this one gave beside hidden states, and what this one did.
        self._beside: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
        self._device, self._dtype, self._store = torch.device(device), dtype, store
        self._shell = Shell(model, self._device, dtype)
        self._num_blocks = num_blocks(inputs)
        # Whose values matter no more where hidden states are given behind the last layer.
        self._first = some_blocks(inputs, slice(0, 1))
        self._layer = 0
        self._hidden_BCD, self._arguments = self._enter({n: t for n, t in inputs.items() if n not in self._later})
        check_activations(self._hidden_BCD, "in front of the first layer: the hidden states")
        self._adds_up: dict[type, bool] = {}
        # The block that has to run again with its FFN's output.
        self._waiting: Block | None = None

    @property
    def adds_up(self) -> bool:
        """Whether the block that `attend` has just run adds the FFN's output to its residual as it is."""
        return self._waiting is None

    @torch.no_grad()
    def attend(self, layer: int) -> Tensor:
        """Run a block up to its FFN and return inputs_TD of that; `advance` must follow.

        Raises:
            InputError: they cannot be computed with.
        """
        self.reach(layer)
        self._beside = self._beside[1], ()
        number, self._layer = layer - self._starts[self._place], layer
        block = self._shell.block(self._place, number, self._arguments[number])
        if block.kind not in self._adds_up:
            self._adds_up[block.kind] = block.adds_up(self._at(slice(0, 1)), self._known(slice(0, 1)))
        self._waiting = None if self._adds_up[block.kind] else block
        given: tuple[Any, ...] = ()

        def inputs() -> Iterator[Tensor]:
            nonlocal given
            for rows in self._chunks(self._hidden_BCD):
                residual_BCD = block(self._at(rows), None, self._known(rows))
                given = block.beside
                if self.adds_up:
                    self._hidden_BCD[rows] = residual_BCD
                yield block.take_inputs().flatten(0, -2)

        inputs_TD = self._store.collect(inputs(), len(self.residual()))
        # It fits any number of blocks of tokens.
        given = tuple(value[:1] if isinstance(value, Tensor) else value for value in given)
        self._beside = self._beside[0], given
        check_activations(inputs_TD, f"layer {layer}: the inputs of its FFN")
        return inputs_TD

    @torch.no_grad()
    def advance(self, outputs_TD: Tensor) -> None:
        """Leave the block with this output of its FFN.

        Raises:
            InputError: the hidden states behind it cannot be computed with.
        """
        outputs_BCD = outputs_TD.view_as(self._hidden_BCD)
        for rows in self._chunks(outputs_BCD):
            self._hidden_BCD[rows] = self._behind(rows, self._widened(outputs_BCD[rows]))
        check_activations(self._hidden_BCD, f"layer {self._layer}: the hidden states behind it")

    @torch.no_grad()
    def behind(self, outputs_ED: Tensor, first: int) -> Tensor:
        """Hidden states_BCD behind the block for the output of its FFN on some tokens; the stream stays where it is.

        Args:
            outputs_ED: for whole blocks of tokens.
            first: number of the first of these blocks.
        """
        outputs_BCD = outputs_ED.view(-1, *self._hidden_BCD.shape[1:])
        pieces = [
            self._behind(slice(first + rows.start, first + rows.stop), self._widened(outputs_BCD[rows]))
            for rows in self._chunks(outputs_BCD)
        ]
        return torch.cat(pieces)

    def _behind(self, rows: slice, outputs_BCD: Tensor) -> Tensor:
        hidden_BCD = self._at(rows)
        if self._waiting is None:
            return hidden_BCD + outputs_BCD
        return self._waiting(hidden_BCD, outputs_BCD, self._known(rows))

    @torch.no_grad()
    def pass_through(self, layer: int, ffn: Callable[[Tensor], Tensor]) -> Tensor:
        """Take the stream through one whole block with this FFN; returns the residual_TD after it."""
        self.advance(ffn(self.attend(layer)))
        return self.residual()

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_tokens(self) -> int:
        """C, the tokens that the model makes of a block."""
        return self._hidden_BCD.shape[1]

    def residual(self) -> Tensor:
        """residual_TD, the stream as it is now, where and in the type in which the store holds it."""
        return self._hidden_BCD.flatten(0, 1)

    def fork(self, residual_TD: Tensor, first: int = 0) -> "HiddenStream":
        """Another stream at the same place of the model: variants of whole blocks, with this residual.

        Args:
            residual_TD: of one or several variants of the blocks from one of this stream's on.
            first: number of that.
        """
        forked = copy.copy(self)
        forked._hidden_BCD = residual_TD.reshape(-1, *self._hidden_BCD.shape[1:]).clone()
        forked._num_blocks = len(forked._hidden_BCD)
        variants = forked._num_blocks // (self._num_blocks - first)
        forked._later = {name: torch.cat([tensor[first:]] * variants) for name, tensor in self._later.items()}
        forked._encoded_BCD = torch.cat([self._encoded_BCD[first:]] * variants)
        return forked

    @torch.no_grad()
    def check_head(self) -> None:
        """After the last layer: refuse a model whose outputs may leave float32.

        Logits of a vocabulary are bounded, not computed: such a head in float32 may be larger than any block.

        Raises:
            InputError: they may not be finite.
        """
        weight_VD = self._shell.head() if "input_ids" in self._first and not self._later else None
        if weight_VD is None:
            for output in self.outputs(range(self._num_blocks)):
                check_activations(output, "behind the last layer: the model's outputs")
            return
        steepest = max(abs(float(end)) for end in weight_VD.aminmax()) * weight_VD.shape[1]
        hidden = (self._at(slice(block, block + 1)) for block in range(self._num_blocks))
        for normed_1CD in self._shell.below_head(hidden):
            check_activations(normed_1CD * steepest, "behind the last layer: the logits, by their bound,", LARGEST**2)

    @torch.no_grad()
    def losses(self, ids_BC: Tensor) -> Tensor:
        """After the last layer: negative log-likelihood in nats of every token but the first of each block, float32.

        Args:
            ids_BC: the ids of the last B of this stream's blocks.

        Returns:
            losses_BL with L = C - 1.

        Raises:
            InputError: they are not finite.
        """
        rows = [
            cross_entropy(logits_CV[:-1], ids_C[1:].to(logits_CV.device), reduction="none").cpu()
            for logits_CV, ids_C in zip(self.outputs(range(self._num_blocks)[-len(ids_BC) :]), ids_BC, strict=True)
        ]
        losses_BL = torch.stack(rows)
        check_activations(losses_BL, "behind the last layer: the losses")
        return losses_BL

    def outputs(self, blocks: Iterable[int]) -> Iterator[Tensor]:
        """After the last layer: what the model gives for each of these blocks, logits_CV of a language model."""
        rows = (slice(block, block + 1) for block in blocks)
        return self._shell.outputs(self._first, ((self._at(one), self._given_encoded(one)) for one in rows))

    def _given_encoded(self, rows: slice) -> dict[str, Any]:
        """What a model takes instead of running its encoder."""
        return {"encoder_outputs": (self._widened(self._encoded_BCD[rows]),)} if self._place else {}

    @torch.no_grad()
    def reach(self, layer: int) -> None:
        """Leave an encoder if this is a block of the decoder; else the stream is there already."""
        if self._place + 2 < len(self._starts) and layer >= self._starts[self._place + 1]:
            hidden = (self._at(rows) for rows in self._chunks(self._hidden_BCD))
            first = {name: tensor for name, tensor in self._first.items() if name not in self._later}
            encoded = self._shell.encode(self._place, first, hidden)
            self._encoded_BCD = self._store.collect(encoded, self._num_blocks)
            self._place, self._beside, self._adds_up = self._place + 1, ((), ()), {}
            self._hidden_BCD, self._arguments = self._enter(self._later)
            check_activations(self._hidden_BCD, "in front of the decoder: the hidden states")

    @torch.no_grad()
    def _enter(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """Hidden states in front of a list of blocks, and what the stock model passes to each block beside them."""
        hidden, calls = self._shell.enter(self._place, inputs, self._num_blocks, self._given_encoded)
        return self._store.collect(hidden, self._num_blocks), calls

    def _known(self, rows: slice) -> dict[Beside, Any]:
        """What stands in calls for what the stream knows, for some blocks of tokens."""
        known: dict[Beside, Any] = {Beside(place): value for place, value in enumerate(self._beside[0])}
        if self._place:
            known[Beside(None)] = self._widened(self._encoded_BCD[rows])
        return known

    def _at(self, rows: slice) -> Tensor:
        """Hidden states of some blocks as they are computed with."""
        return self._widened(self._hidden_BCD[rows])

    def _widened(self, stored: Tensor) -> Tensor:
        return stored.to(self._device, self._dtype)

    @staticmethod
    def _chunks(hidden_BCD: Tensor) -> Iterator[slice]:
        """Blocks that go through the model at once."""
        return stretches(len(hidden_BCD), max(1, CHUNK_TOKENS // hidden_BCD.shape[1]))
