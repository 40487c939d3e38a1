"""Calibration hidden states walk through the model one block at a time; no more than one block is ever in memory.

    stream = HiddenStream(model, {"input_ids": ids_BC})
    for layer in range(num_layers):
        inputs_TD = stream.attend(layer)          # up to the FFN: what it would see
        stream.advance(converted_ffn(inputs_TD))  # the next block is calibrated on what this one really gives

Everything but the FFN is done by the stock model's own modules, so nothing is assumed of embeddings, norms, residuals
or heads. Where a block adds the FFN's output to its residual as it is, as llama does, attention runs once and `advance`
is an addition; where it does not (a norm behind the FFN, a factor on it), the block runs again with the output given.

Legend: B blocks of C tokens, T = B * C tokens, D hidden size, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moeify.families import Sites
from moeify.models.ffn import CHUNK_TOKENS


class Source(Protocol):
    """What a stream needs of a model: a DenseModel on disk, or one that is loaded."""

    @property
    def sites(self) -> Sites: ...

    @property
    def skeleton(self) -> Any: ...

    @property
    def tied(self) -> Mapping[str, str]: ...

    def get(self, names: Iterable[str]) -> dict[str, Tensor]: ...


# What a block is called with beside the hidden states.
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


class HiddenStream:
    """Hidden states of the calibration text on their way through the model.

    Args:
        model: the model.
        inputs: what the stock model is called with, by name: tensors of B blocks, such as `input_ids` of C tokens each.
        device: where the arithmetic runs.
        dtype: in which it runs; float32 unless there is a reason.
    """

    def __init__(
        self,
        model: Source,
        inputs: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._sites = model, model.sites
        self._device, self._dtype = torch.device(device), dtype
        self._num_blocks = len(next(iter(inputs.values())))
        self._hidden_BCD, self._arguments = self._enter(inputs)
        self._adds_up: dict[type, bool] = {}
        # The block that has to run again with its FFN's output.
        self._waiting: _Block | None = None

    @property
    def adds_up(self) -> bool:
        """Whether the block that `attend` has just run adds the FFN's output to its residual as it is."""
        return self._waiting is None

    @torch.no_grad()
    def attend(self, layer: int) -> Tensor:
        """Run a block up to its FFN and return inputs_TD of that; `advance` must follow."""
        block = self._load(layer)
        if block.kind not in self._adds_up:
            self._adds_up[block.kind] = block.adds_up(self._hidden_BCD[:1])
        self._waiting = None if self._adds_up[block.kind] else block
        inputs = []
        for rows in self._chunks(self._hidden_BCD):
            residual_BCD = block(self._hidden_BCD[rows], None)
            if self.adds_up:
                self._hidden_BCD[rows] = residual_BCD
            inputs.append(block.take_inputs().flatten(0, 1))
        return torch.cat(inputs)

    @torch.no_grad()
    def advance(self, outputs_TD: Tensor) -> None:
        """Leave the block with this output of its FFN."""
        if self.adds_up:
            self._hidden_BCD += outputs_TD.view_as(self._hidden_BCD)
        else:
            self._hidden_BCD = self.behind(outputs_TD, 0)

    @torch.no_grad()
    def behind(self, outputs_ED: Tensor, first: int) -> Tensor:
        """Hidden states_BCD behind the block for the output of its FFN on some tokens; the stream stays where it is.

        Args:
            outputs_ED: for whole blocks of tokens.
            first: number of the first of these blocks.
        """
        outputs_BCD = outputs_ED.view(-1, *self._hidden_BCD.shape[1:])
        hidden_BCD, block = self._hidden_BCD[first : first + len(outputs_BCD)], self._waiting
        if block is None:
            return hidden_BCD + outputs_BCD
        return torch.cat([block(hidden_BCD[rows], outputs_BCD[rows]) for rows in self._chunks(outputs_BCD)])

    @torch.no_grad()
    def pass_through(self, layer: int, ffn: Callable[[Tensor], Tensor]) -> Tensor:
        """Take the stream through one whole block with this FFN; returns the residual_TD after it."""
        self.advance(ffn(self.attend(layer)))
        return self.residual()

    def residual(self) -> Tensor:
        """residual_TD, the stream as it is now."""
        return self._hidden_BCD.flatten(0, 1)

    def fork(self, residual_TD: Tensor) -> "HiddenStream":
        """Another stream at the same place of the model: whole blocks, with this residual."""
        forked = copy.copy(self)
        forked._hidden_BCD = residual_TD.reshape(-1, *self._hidden_BCD.shape[1:]).clone()
        forked._num_blocks = len(forked._hidden_BCD)
        return forked

    @torch.no_grad()
    def losses(self, ids_BC: Tensor) -> Tensor:
        """After the last layer: negative log-likelihood in nats of every token but the first of each block, float32.

        Args:
            ids_BC: the ids of the last B of this stream's blocks.

        Returns:
            losses_BL with L = C - 1.
        """
        rows = [
            cross_entropy(logits_CV[:-1], ids_C[1:].to(logits_CV.device), reduction="none").cpu()
            for logits_CV, ids_C in zip(self.logits(range(self._num_blocks)[-len(ids_BC) :]), ids_BC, strict=True)
        ]
        return torch.stack(rows)

    @torch.no_grad()
    def logits(self, blocks: Iterable[int]) -> Iterator[Tensor]:
        """After the last layer: logits_CV of these blocks, one at a time."""
        outer, passages = self._outer()
        outer.set_input_embeddings(nn.Identity())
        self._fill(outer, "")
        for block in blocks:
            passages[-1].gives = self._hidden_BCD[block][None]
            yield outer(inputs_embeds=self._hidden_BCD[block][None], use_cache=False).logits[0]

    @torch.no_grad()
    def _enter(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """Hidden states in front of the first block, and what the stock model passes to each block beside them."""
        outer, passages = self._outer()
        base = outer.base_model
        prefix = f"{outer.base_model_prefix}." if base is not outer else ""
        if "input_ids" in inputs:
            inputs = {**inputs, "input_ids": self._look_up(base, prefix, inputs["input_ids"])}
        self._fill(base, prefix)

        def enter(rows: slice) -> Tensor:
            base(**{name: tensor[rows].to(self._device) for name, tensor in inputs.items()}, use_cache=False)
            return passages[0].hidden_BCD

        # With one block, so that what is noted fits any number of them.
        hidden_BCD = enter(slice(0, 1)).repeat(self._num_blocks, 1, 1)
        calls = [passage.call for passage in passages]
        passages[0].stops = True
        for rows in self._chunks(hidden_BCD):
            with contextlib.suppress(_Arrived):
                enter(rows)
            hidden_BCD[rows] = passages[0].hidden_BCD
        return hidden_BCD, calls

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

    def _outer(self) -> tuple[Any, list["_Passage"]]:
        """The stock model with passages instead of blocks; its parameters are not filled yet."""
        outer = _copy(self._model.skeleton, self._sites.blocks)
        blocks: Any = self._model.skeleton.get_submodule(self._sites.blocks)
        passages = [_Passage(block) for block in blocks]
        outer.set_submodule(self._sites.blocks, nn.ModuleList(passages))
        return outer, passages

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

    def _load(self, layer: int) -> "_Block":
        """One block with weights, its FFN replaced."""
        prefix = f"{self._sites.blocks}.{layer}"
        module = _copy(self._model.skeleton.get_submodule(prefix))
        block = _Block(module, self._sites, self._arguments[layer])
        self._assign(module, {name: f"{prefix}.{name}" for name in module.state_dict()})
        return block

    @staticmethod
    def _chunks(hidden_BCD: Tensor) -> Iterator[slice]:
        """Blocks that go through the model at once."""
        step = max(1, CHUNK_TOKENS // hidden_BCD.shape[1])
        return (slice(start, start + step) for start in range(0, len(hidden_BCD), step))


class _Arrived(Exception):  # noqa: N818
    """The hidden states are in front of the first block; what lies behind it need not run."""


class _Passage(nn.Module):
    """Stands in for a block: notes what the model passes to it, and lets the hidden states through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.hidden_BCD = torch.empty(0)
        self.call: Call = ((), {})
        # What it gives instead of what it gets, if anything; or whether the model goes no further.
        self.gives: Tensor | None = None
        self.stops = False
        # Some models choose the mask by an attribute of the block.
        for name in ("attention_type", "layer_type"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        self.hidden_BCD = arguments[0] if arguments else named.pop("hidden_states")
        self.call = (arguments[1:], named)
        if self.stops:
            raise _Arrived
        return self.hidden_BCD if self.gives is None else self.gives


class _Site:
    """What passes the FFN of a block: its input, and the output that it is to give; None stands for zeros."""

    def __init__(self) -> None:
        self.inputs_BCD, self.outputs_BCD = torch.empty(0), torch.empty(0)
        self.gives_zeros = True

    def give(self) -> Tensor:
        return torch.zeros_like(self.inputs_BCD) if self.gives_zeros else self.outputs_BCD


class _Reader(nn.Module):
    """Stands where the FFN reads, and, if that is one module, gives its output as well."""

    def __init__(self, site: _Site, *, writes: bool) -> None:
        super().__init__()
        self._site, self._writes = site, writes

    def forward(self, inputs_BCD: Tensor, *_: Any, **__: Any) -> Tensor:
        self._site.inputs_BCD = inputs_BCD
        return self._site.give() if self._writes else inputs_BCD


class _Writer(nn.Module):
    """Stands where the FFN writes."""

    def __init__(self, site: _Site) -> None:
        super().__init__()
        self._site = site

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self._site.give()


class _Silent(nn.Module):
    """Stands for a further part of the FFN."""

    def forward(self, inputs_BCD: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(inputs_BCD)


class _Block:
    """A stock block without its FFN.

    Args:
        module: the block; its FFN is replaced in place.
        sites: where that reads and writes.
        call: what the model calls the block with.
    """

    def __init__(self, module: nn.Module, sites: Sites, call: Call) -> None:
        self.kind = type(module)
        self._module, self._call, self._site = module, call, _Site()
        module.set_submodule(sites.read, _Reader(self._site, writes=sites.read == sites.write))
        if sites.write != sites.read:
            module.set_submodule(sites.write, _Writer(self._site))
        for name in sites.beside:
            module.set_submodule(name, _Silent())

    def take_inputs(self) -> Tensor:
        """inputs_BCD of the FFN in the last call; they are not kept."""
        inputs_BCD, self._site.inputs_BCD = self._site.inputs_BCD, torch.empty(0)
        return inputs_BCD

    def __call__(self, hidden_BCD: Tensor, outputs_BCD: Tensor | None) -> Tensor:
        """The block's output for an output of its FFN; None is an FFN that gives zeros."""
        self._site.gives_zeros = outputs_BCD is None
        if outputs_BCD is not None:
            self._site.outputs_BCD = outputs_BCD
        arguments, named = self._call
        result = self._module(hidden_BCD, *arguments, **named)
        block_BCD: Tensor = result[0] if isinstance(result, tuple) else result
        return block_BCD

    def adds_up(self, hidden_1CD: Tensor) -> bool:
        """Whether the FFN's output is added to the rest as it is, bit for bit."""
        generator = torch.Generator().manual_seed(0)
        outputs_1CD = torch.randn(hidden_1CD.shape, generator=generator).to(hidden_1CD)
        return torch.equal(self(hidden_1CD, outputs_1CD), self(hidden_1CD, None) + outputs_1CD)


def _copy(module: nn.Module, left_out: str = "") -> Any:
    """A copy that shares its parameters with the original, and one submodule as a whole."""
    shared: list[Any] = [*module.parameters(), *([module.get_submodule(left_out)] if left_out else [])]
    return copy.deepcopy(module, {id(part): part for part in shared})
