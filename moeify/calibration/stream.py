"""Calibration hidden states walk through the model one block at a time; no more than one block is ever in memory.

    stream = HiddenStream(model, {"input_ids": ids_BC})
    for layer in range(num_layers):
        inputs_TD = stream.attend(layer)          # up to the FFN: what it would see
        stream.advance(converted_ffn(inputs_TD))  # the next block is calibrated on what this one really gives

Everything but the FFN is done by the stock model's own modules, so nothing is assumed of embeddings, norms, residuals
or heads. Where a block adds the FFN's output to its residual as it is, as llama does, attention runs once and `advance`
is an addition; where it does not (a norm behind the FFN, a factor on it), the block runs again with the output given.

Legend: B blocks (texts, images) of C tokens, T = B * C tokens, D hidden size, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moeify.calibration.blocks import Arrived, Block, Call, Passage, copy_sharing
from moeify.calibration.overflow import LARGEST, check_activations
from moeify.calibration.store import IN_MEMORY, Store, stretches
from moeify.families import Sites
from moeify.models.ffn import CHUNK_TOKENS
from moeify.models.inputs import num_blocks, output_of, some_blocks, uncached


class Source(Protocol):
    """What a stream needs of a model: a DenseModel on disk, or one that is loaded."""

    @property
    def sites(self) -> Sites: ...

    @property
    def skeleton(self) -> Any: ...

    @property
    def tied(self) -> Mapping[str, str]: ...

    def get(self, names: Iterable[str]) -> dict[str, Tensor]: ...


class HiddenStream:
    """Hidden states of the calibration text on their way through the model.

    Args:
        model: the model.
        inputs: what the stock model is called with, by name: tensors of B blocks, such as `input_ids` of C tokens each,
            or `pixel_values` of images that the model makes C tokens of.
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
        self._model, self._sites = model, model.sites
        self._device, self._dtype, self._store = torch.device(device), dtype, store
        self._num_blocks = num_blocks(inputs)
        # Whose values matter no more where hidden states are given behind the last layer.
        self._first = some_blocks(inputs, slice(0, 1))
        self._layer = 0
        self._hidden_BCD, self._arguments = self._enter(inputs)
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
        block, self._layer = self._load(layer), layer
        if block.kind not in self._adds_up:
            self._adds_up[block.kind] = block.adds_up(self._at(slice(0, 1)))
        self._waiting = None if self._adds_up[block.kind] else block

        def inputs() -> Iterator[Tensor]:
            for rows in self._chunks(self._hidden_BCD):
                residual_BCD = block(self._at(rows), None)
                if self.adds_up:
                    self._hidden_BCD[rows] = residual_BCD
                yield block.take_inputs().flatten(0, -2)

        inputs_TD = self._store.collect(inputs(), len(self.residual()))
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
        return hidden_BCD + outputs_BCD if self._waiting is None else self._waiting(hidden_BCD, outputs_BCD)

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

    def fork(self, residual_TD: Tensor) -> "HiddenStream":
        """Another stream at the same place of the model: whole blocks, with this residual."""
        forked = copy.copy(self)
        forked._hidden_BCD = residual_TD.reshape(-1, *self._hidden_BCD.shape[1:]).clone()
        forked._num_blocks = len(forked._hidden_BCD)
        return forked

    @torch.no_grad()
    def check_head(self) -> None:
        """After the last layer: refuse a model whose outputs may leave float32.

        Logits of a vocabulary are bounded, not computed: such a head in float32 may be larger than any block.

        Raises:
            InputError: they may not be finite.
        """
        head = self._model.skeleton.get_output_embeddings()
        names = [name for name, module in self._model.skeleton.named_modules() if module is head]
        if not names or "input_ids" not in self._first:
            for output in self.outputs(range(self._num_blocks)):
                check_activations(output, "behind the last layer: the model's outputs")
            return
        stored = f"{names[0]}.weight"
        weight_VD = next(iter(self._model.get([self._model.tied.get(stored, stored)]).values()))
        steepest = max(abs(float(end)) for end in weight_VD.aminmax()) * weight_VD.shape[1]
        outer, passages = self._outer()
        base = outer.base_model
        base.set_input_embeddings(nn.Identity())
        self._fill_base(outer)
        for block in range(self._num_blocks):
            passages[-1].gives = hidden_1CD = self._at(slice(block, block + 1))
            normed_1CD = base(inputs_embeds=self._embedded(hidden_1CD), **uncached(base))[0]
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

    @torch.no_grad()
    def outputs(self, blocks: Iterable[int]) -> Iterator[Tensor]:
        """After the last layer: what the model gives for each of these blocks, logits_CV of a language model."""
        outer, passages = self._outer()
        text = "input_ids" in self._first
        if text:
            outer.set_input_embeddings(nn.Identity())
        self._fill_base(outer)
        if outer.base_model is not outer:
            for name, head in outer.named_children():
                if head is not outer.base_model:
                    self._fill(head, f"{name}.")
        for block in blocks:
            passages[-1].gives = hidden_1CD = self._at(slice(block, block + 1))
            inputs = {"inputs_embeds": self._embedded(hidden_1CD)} if text else self._called_with(self._first)
            yield output_of(outer(**inputs, **uncached(outer)))[0]

    def _embedded(self, hidden_1CD: Tensor) -> Tensor:
        """What stands for embeddings whose values matter no more; some models make them wider for their blocks."""
        width = self._model.skeleton.get_input_embeddings().weight.shape[1]
        return hidden_1CD if width == hidden_1CD.shape[2] else hidden_1CD.new_zeros(*hidden_1CD.shape[:2], width)

    def _called_with(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs where the arithmetic runs, and in its type but for those that are numbers of something."""
        return {
            name: tensor.to(self._device, self._dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in inputs.items()
        }

    @torch.no_grad()
    def _enter(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """Hidden states in front of the first block, and what the stock model passes to each block beside them."""
        outer, passages = self._outer()
        base = outer.base_model
        prefix = f"{outer.base_model_prefix}." if base is not outer else ""
        if "input_ids" in inputs:
            inputs = {**inputs, "input_ids": self._look_up(base, prefix, inputs["input_ids"])}
        self._fill_base(outer)

        def enter(rows: slice) -> Tensor:
            base(**self._called_with(some_blocks(inputs, rows)), **uncached(base))
            return passages[0].hidden_BCD

        # With one block, so that what is noted fits any number of them.
        first_1CD = enter(slice(0, 1))
        calls = [passage.call for passage in passages]
        passages[0].stops = True

        def hidden() -> Iterator[Tensor]:
            for rows in self._chunks(first_1CD.expand(self._num_blocks, -1, -1)):
                with contextlib.suppress(Arrived):
                    enter(rows)
                yield passages[0].hidden_BCD

        return self._store.collect(hidden(), self._num_blocks), calls

    def _look_up(self, base: Any, prefix: str, ids_BC: Tensor) -> Tensor:
        """Give the model the embeddings that the text uses, and return the ids by which it finds them there.

        A whole vocabulary in float32 may be larger than a block.
        """
        embedding = base.get_input_embeddings()
        name = prefix + next(name for name, module in base.named_modules() if module is embedding) + ".weight"
        used_U, ids_BC = ids_BC.unique(return_inverse=True)
        table_UD = self._model.get([name])[name][used_U].to(self._device, self._dtype)
        embedding.weight, embedding.padding_idx = nn.Parameter(table_UD, requires_grad=False), None
        return ids_BC

    def _outer(self) -> tuple[Any, list[Passage]]:
        """The stock model with passages instead of blocks; its parameters are not filled yet."""
        outer = copy_sharing(self._model.skeleton, self._sites.blocks)
        blocks: Any = self._model.skeleton.get_submodule(self._sites.blocks)
        passages = [Passage(block, self._sites) for block in blocks]
        outer.set_submodule(self._sites.blocks, nn.ModuleList(passages))
        return outer, passages

    def _fill_base(self, outer: Any) -> None:
        """Fill the model below its head, of one that reads text in a part of its own that part alone."""
        base = outer.base_model
        prefix = f"{outer.base_model_prefix}." if base is not outer else ""
        reader = getattr(base, "language_model", None)
        self._fill(*((base, prefix) if reader is None else (reader, f"{prefix}language_model.")))

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Load what is not there yet, and put the module on the device."""
        buffers = {name for name, _ in module.named_buffers()}
        names = [name for name, tensor in module.state_dict().items() if tensor.is_meta or name in buffers]
        self._assign(module, {name: self._model.tied.get(prefix + name, prefix + name) for name in names})

    def _assign(self, module: nn.Module, names: Mapping[str, str]) -> None:
        tensors = self._model.get(dict.fromkeys(names.values()))
        state = {name: tensors[stored].to(self._device, self._dtype) for name, stored in names.items()}
        module.load_state_dict(state, assign=True, strict=False)
        module.to(self._device)

    def _load(self, layer: int) -> Block:
        """One block with weights, its FFN replaced."""
        prefix = f"{self._sites.blocks}.{layer}"
        module = copy_sharing(self._model.skeleton.get_submodule(prefix))
        block = Block(module, self._sites, self._arguments[layer])
        self._assign(module, {name: f"{prefix}.{name}" for name in module.state_dict()})
        return block

    def _at(self, rows: slice) -> Tensor:
        """Hidden states of some blocks as they are computed with."""
        return self._widened(self._hidden_BCD[rows])

    def _widened(self, stored: Tensor) -> Tensor:
        return stored.to(self._device, self._dtype)

    @staticmethod
    def _chunks(hidden_BCD: Tensor) -> Iterator[slice]:
        """Blocks that go through the model at once."""
        return stretches(len(hidden_BCD), max(1, CHUNK_TOKENS // hidden_BCD.shape[1]))
