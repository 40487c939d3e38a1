"""Stock blocks without their FFN, and stand-ins for whole blocks: what a hidden stream is made of.

Legend: B blocks of text of C tokens, D hidden size.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from moeify.families import Sites

# What a block is called with beside the hidden states.
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Beside:
    """Stands in a call for what the stream knows when the block runs.

    Args:
        place: of what the block before it gives beside its hidden states; None is what the encoder gives.
    """

    place: int | None


class Arrived(Exception):  # noqa: N818
    """The hidden states are in front of the first block; what lies behind it need not run."""


class Passage(nn.Module):
    """Stands in for a block: notes what the model passes to it, and lets the hidden states through."""

    def __init__(self, block: nn.Module, sites: Sites) -> None:
        super().__init__()
        self.hidden_BCD = torch.empty(0)
        self.call: Call = ((), {})
        # What it gives instead of what it gets, if anything; or whether the model goes no further.
        self.gives: Tensor | None = None
        self.stops = False
        # In a list, so that it is no part of this module.
        self._block, self._sites = [block], sites
        # What it gives beside hidden states, on no device; None of a block that gives these alone.
        self.beside: tuple[Any, ...] | None = None
        # Some models choose the mask by an attribute of the block.
        for name in ("attention_type", "layer_type"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if self._block:
            self.beside = given_beside(self._block.pop(), self._sites, (arguments, named))
        self.hidden_BCD = arguments[0] if arguments else named.pop("hidden_states")
        self.call = (arguments[1:], named)
        if self.stops:
            raise Arrived
        gives = self.hidden_BCD if self.gives is None else self.gives
        return gives if self.beside is None else (gives, *self.beside)


# By class of block, where no tensor is among it: a run of one is a sixth of a small split.
_BESIDE: dict[type, tuple[Any, ...] | None] = {}


def given_beside(block: nn.Module, sites: Sites, call: Call) -> tuple[Any, ...] | None:
    """What a block gives beside its hidden states, as older models do; tensors are on no device.

    Args:
        block: stays as it is.
        sites: where its FFN reads and writes.
        call: what the model passes to it, the hidden states included.
    """
    if type(block) in _BESIDE:
        return _BESIDE[type(block)]
    beside = _run_without_ffn(block, sites, call)
    # A position bias is as long as the text, and encoder and decoder may have blocks of one class.
    if not any(isinstance(part, Tensor) for part in beside or ()):
        _BESIDE[type(block)] = beside
    return beside


def _run_without_ffn(block: nn.Module, sites: Sites, call: Call) -> tuple[Any, ...] | None:
    """See `given_beside`."""
    # Not by `to`, which may put the originals there as well.
    parts = [*block.parameters(), *block.buffers()]
    module: Any = copy.deepcopy(block, {id(part): part.detach().to("meta") for part in parts})
    Block(module, sites, call)
    arguments, named = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, call)
    try:
        given = module(*arguments, **named)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        # What looks at numbers does not run there; models of today give a tensor.
        return None
    return given[1:] if isinstance(given, tuple) else None


class _Site:
    """What passes the FFN of a block: its input, and the output that it is to give; None stands for zeros."""

    def __init__(self) -> None:
        self.inputs_BCD = torch.empty(0)
        self.outputs_BCD: Tensor | None = None

    def give(self) -> Tensor:
        # Some blocks flatten what their FFN reads.
        given = self.outputs_BCD
        return torch.zeros_like(self.inputs_BCD) if given is None else given.view_as(self.inputs_BCD)


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


class Block:
    """A stock block without its FFN.

    Args:
        module: the block; its FFN is replaced in place.
        sites: where that reads and writes.
        call: what the model calls the block with.
    """

    def __init__(self, module: nn.Module, sites: Sites, call: Call) -> None:
        # What the last call gave beside hidden states.
        self.beside: tuple[Any, ...] = ()
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

    def __call__(
        self, hidden_BCD: Tensor, outputs_BCD: Tensor | None, known: Mapping[Beside, Any] = MappingProxyType({})
    ) -> Tensor:
        """The block's output for an output of its FFN; None is an FFN that gives zeros.

        Args:
            hidden_BCD: in front of it.
            outputs_BCD: of its FFN.
            known: what stands in its call for something else.
        """
        self._site.outputs_BCD = outputs_BCD
        arguments, named = tree_map(lambda leaf: known[leaf] if isinstance(leaf, Beside) else leaf, self._call)
        result = self._module(hidden_BCD, *arguments, **named)
        if not isinstance(result, tuple):
            return result  # type: ignore[no-any-return]
        self.beside = result[1:]
        return result[0]  # type: ignore[no-any-return]

    def adds_up(self, hidden_1CD: Tensor, known: Mapping[Beside, Any]) -> bool:
        """Whether the FFN's output is added to the rest as it is, bit for bit."""
        generator = torch.Generator().manual_seed(0)
        outputs_1CD = torch.randn(hidden_1CD.shape, generator=generator).to(hidden_1CD)
        return torch.equal(self(hidden_1CD, outputs_1CD, known), self(hidden_1CD, None, known) + outputs_1CD)


def copy_sharing(module: nn.Module, left_out: Iterable[str] = ()) -> Any:
    """A copy that shares its parameters with the original, and some submodules as a whole."""
    shared: list[Any] = [*module.parameters(), *map(module.get_submodule, left_out)]
    return copy.deepcopy(module, {id(part): part for part in shared})
