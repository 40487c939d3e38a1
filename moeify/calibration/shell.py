"""The stock model around its blocks: what goes into a list of them, and what the model makes of what comes out.

Its own code runs, with a passage in place of each block; only what that needs is loaded.

Legend: B blocks (texts, images) of C tokens, T = B * C tokens, D hidden size, U words that a text uses.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moeify.calibration.blocks import Arrived, Beside, Block, Call, Passage, copy_sharing
from moeify.calibration.store import stretches
from moeify.families import Sites
from moeify.models.ffn import CHUNK_TOKENS
from moeify.models.inputs import output_of, some_blocks, uncached

# What the names of a decoder's inputs begin with.
DECODER = "decoder_"


class Source(Protocol):
    """What a stream needs of a model: a DenseModel on disk, or one that is loaded."""

    @property
    def sites(self) -> tuple[Sites, ...]: ...

    @property
    def skeleton(self) -> Any: ...

    @property
    def tied(self) -> Mapping[str, str]: ...

    def get(self, names: Iterable[str]) -> dict[str, Tensor]: ...


class Shell:
    """A model whose blocks are loaded one at a time, and the rest of it when it is needed.

    Args:
        model: the model.
        device: where the arithmetic runs.
        dtype: in which it runs.
    """

    def __init__(self, model: Source, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._sites = model, model.sites
        self._device, self._dtype = device, dtype

    def block(self, place: int, number: int, call: Call) -> Block:
        """A block with its weights, its FFN replaced.

        Args:
            place: of its list.
            number: in that.
            call: what the stock model passes to it.
        """
        prefix = f"{self._sites[place].blocks}.{number}"
        module = copy_sharing(self._model.skeleton.get_submodule(prefix))
        block = Block(module, self._sites[place], call)
        self._assign(module, {name: f"{prefix}.{name}" for name in module.state_dict()})
        return block

    @torch.no_grad()
    def enter(
        self, place: int, inputs: Mapping[str, Tensor], num_blocks: int, encoded: Callable[[slice], dict[str, Any]]
    ) -> tuple[Iterator[Tensor], list[Call]]:
        """Hidden states_BCD in front of a list of blocks, and what the stock model passes to each block beside them.

        Args:
            place: of the list.
            inputs: of the model, as it is called.
            num_blocks: of tokens.
            encoded: what the model takes instead of running its encoder, for some of these.
        """
        outer, lists = self._outer()
        base, passages = outer.base_model, lists[place]
        prefix = f"{outer.base_model_prefix}." if base is not outer else ""
        for name in inputs:
            if name.endswith("input_ids"):
                inputs = {**inputs, name: self._look_up(base, prefix, inputs[name])}
        self._fill_base(outer)
        given: dict[str, Any] = {}

        def arrive(rows: slice) -> Tensor:
            given.update(encoded(rows))
            with contextlib.suppress(Arrived):
                base(**self._called_with(some_blocks(inputs, rows)), **given, **uncached(base))
            return passages[0].hidden_BCD

        # With one block, so that what is noted fits any number of them.
        passages[-1].stops = True
        context = arrive(slice(0, 1)).shape[1]
        calls = _noted(passages, given)
        passages[0].stops = True
        return (arrive(rows) for rows in stretches(num_blocks, max(1, CHUNK_TOKENS // context))), calls

    @torch.no_grad()
    def encode(self, place: int, first: Mapping[str, Tensor], hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """What an encoder gives for hidden states_BCD behind its last block.

        Args:
            place: of its list of blocks.
            first: inputs of one block, whose values matter no more.
            hidden: the hidden states.
        """
        outer, passages = self._outer()
        base = outer.base_model
        self._fill_base(outer)
        encoded: list[Tensor] = []

        def arrive(_: nn.Module, __: Any, output: Any) -> None:
            encoded.append(output[0])
            raise Arrived

        base.get_encoder().register_forward_hook(arrive)
        for hidden_BCD in hidden:
            passages[place][-1].gives = hidden_BCD
            with contextlib.suppress(Arrived):
                base(**self._called_with({n: t.expand(len(hidden_BCD), *t.shape[1:]) for n, t in first.items()}))
            yield encoded.pop()

    @torch.no_grad()
    def outputs(self, first: Mapping[str, Tensor], given: Iterable[tuple[Tensor, dict[str, Any]]]) -> Iterator[Tensor]:
        """What the model gives for hidden states behind its last block.

        Args:
            first: inputs of one block, whose values matter no more.
            given: hidden_1CD of each block, and, where a decoder wrote them, what the model takes instead of running
                its encoder.
        """
        outer, passages = self._outer()
        written = any(name.startswith(DECODER) for name in first)
        text = "input_ids" in first or written
        if text:
            outer.set_input_embeddings(nn.Identity())
        self._fill_base(outer)
        for name, part in outer.named_children():
            # Heads beside what stands below them, or among its parts.
            if part is not outer.base_model:
                self._fill(part, f"{name}.")
        for hidden_1CD, encoded in given:
            passages[-1][-1].gives = hidden_1CD
            embedded = f"{DECODER if written else ''}inputs_embeds"
            inputs = {embedded: self._embedded(hidden_1CD)} if text else self._called_with(first)
            yield output_of(outer(**inputs, **encoded, **uncached(outer)))[0]

    def head(self) -> Tensor | None:
        """weight_VD of the head for a vocabulary of V words, as it is stored; None of a model without one."""
        skeleton = self._model.skeleton
        head = skeleton.get_output_embeddings()
        names = [f"{name}.weight" for name, module in skeleton.named_modules() if module is head]
        stored = [self._model.tied.get(name, name) for name in names[:1]]
        return next(iter(self._model.get(stored).values()), None)

    @torch.no_grad()
    def below_head(self, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """What a language model's head gets, for hidden_1CD of each block behind its last one."""
        outer, passages = self._outer()
        base = outer.base_model
        base.set_input_embeddings(nn.Identity())
        self._fill_base(outer)
        for hidden_1CD in hidden:
            passages[-1][-1].gives = hidden_1CD
            yield base(inputs_embeds=self._embedded(hidden_1CD), **uncached(base))[0]

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

    def _look_up(self, base: Any, prefix: str, ids_BC: Tensor) -> Tensor:
        """Give the model the embeddings that the text uses, and return the ids by which it finds them there.

        A whole vocabulary in float32 may be larger than a block.
        """
        embedding = base.get_input_embeddings()
        name = prefix + next(name for name, module in base.named_modules() if module is embedding) + ".weight"
        used_U, ids_BC = _renumbered(ids_BC, getattr(base.config, "pad_token_id", None))
        table_UD = self._model.get([self._model.tied.get(name, name)])
        table = nn.Parameter(next(iter(table_UD.values()))[used_U].to(self._device, self._dtype), requires_grad=False)
        whole = embedding.weight
        for module in base.modules():
            # Encoder and decoder have one each, which share a table.
            if isinstance(module, nn.Embedding) and module.weight is whole:
                module.weight, module.padding_idx = table, None
        return ids_BC

    def _outer(self) -> tuple[Any, list[list[Passage]]]:
        """The stock model with passages instead of blocks, by list; its parameters are not filled yet."""
        outer = copy_sharing(self._model.skeleton, [sites.blocks for sites in self._sites])
        lists = []
        for sites in self._sites:
            blocks: Any = self._model.skeleton.get_submodule(sites.blocks)
            lists.append([Passage(block, sites) for block in blocks])
            outer.set_submodule(sites.blocks, nn.ModuleList(lists[-1]))
        return outer, lists

    def _fill_base(self, outer: Any) -> None:
        """Fill the model below its head, of one that reads text in a part of its own that part alone."""
        base = outer.base_model
        if base is outer and (head := outer.get_output_embeddings()) is not None:
            # Its head is one of its parts.
            for name, part in outer.named_children():
                if part is not head:
                    self._fill(part, f"{name}.")
            return
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


def _renumbered(ids_BC: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
    """Words that a text uses, and the text in numbers of these; that of padding stays padding's alone.

    Some models tell positions by the words that are no padding, as RoBERTa does.
    """
    used_U, numbers_BC = ids_BC.unique(return_inverse=True)
    others_U = used_U[used_U != padding]
    if padding is None or padding > len(others_U):
        return used_U, numbers_BC
    used_U = torch.cat([others_U[:padding], others_U.new_tensor([padding]), others_U[padding:]])
    numbers = torch.zeros(int(used_U.max()) + 1, dtype=ids_BC.dtype)
    numbers[used_U] = torch.arange(len(used_U), dtype=ids_BC.dtype)
    return used_U, numbers[ids_BC]


def _noted(passages: list[Passage], encoded: Mapping[str, Any]) -> list[Call]:
    """The calls, with words for what only a run of the blocks before gives."""
    calls, before = [], [(id(states), Beside(None)) for given in encoded.values() for states in given]
    for passage, previous in zip(passages, [None, *passages[:-1]], strict=True):
        given = enumerate((previous.beside if previous is not None else None) or ())
        words = dict([*before, *((id(value), Beside(place)) for place, value in given if value is not None)])
        calls.append(tree_map(lambda leaf, words=words: words.get(id(leaf), leaf), passage.call))
    return calls
