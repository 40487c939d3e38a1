"""Finds where an FFN reads and writes, and its activation, by running a tiny model of the config.

What goes into and out of every module of one block is noted. The site and the activation are those by which the FFN's
matrices alone, taken out of the block, give what was noted.

Legend: T tokens, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from moeify.convert.exactness import STOPS, twin_values
from moeify.errors import InputError
from moeify.families import Family
from moeify.models.dense import blocks_of
from moeify.models.ffn import tensor_names, unpack
from moeify.models.heads import auto_class
from moeify.models.inputs import uncached
from moeify.models.stock import quiet

# Tried where the config names none, or one by which nothing fits.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu")
# Largest difference of an output relative to the largest; gelu and its approximation are 1e-4 apart.
TOLERANCE = 1e-5
NUM_TOKENS = 16


@dataclass(frozen=True)
class Call:
    """What a module of a block was given, and what it gave."""

    name: str
    input_TD: Tensor
    output_TD: Tensor


def proven(family: Family, config: Any) -> Family | None:
    """The family with the site and the activation that are right; None if none is, or no tiny model can be run.

    Args:
        family: what is known of it so far.
        config: of the model.
    """
    try:
        block, calls = _run(family, config)
        found = (found for found in _candidates(family, calls, config) if _fits(found, block, calls, config))
        return next(found, None)
    except (*STOPS, InputError):
        # Whatever stops a tiny model of a config that nobody has seen leaves the draft unproven, which it then says.
        return None


@torch.no_grad()
def _run(family: Family, config: Any) -> tuple[nn.Module, dict[str, Call]]:
    """The first block of a tiny model, and the calls of its modules, in the order in which they began."""
    values = {name: value for name, value in twin_values(config, family).items() if name != "model_type"}
    tiny = AutoConfig.for_model(config.model_type, **values)
    with quiet():
        model = auto_class(config).from_config(tiny).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + (parameter.ndim == 1) * 0.5)
    block: nn.Module = model.get_submodule(blocks_of(model, family).site(0))
    calls: dict[str, Call | None] = {}

    def begin(name: str) -> Any:
        def note(*_: Any) -> None:
            calls.setdefault(name, None)

        return note

    for name, module in block.named_modules():
        module.register_forward_pre_hook(begin(name))
        module.register_forward_hook(_note(name, calls))
    model(**_inputs(family, tiny), **uncached(model))
    return block, {name: call for name, call in calls.items() if call is not None}


def _inputs(family: Family, config: Any) -> dict[str, Tensor]:
    if family.modality == "image":
        size = int(config.image_size)
        pixels = torch.randn(1, int(config.num_channels), size, size, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels}
    return {"input_ids": torch.arange(3, 3 + NUM_TOKENS)[None]}


def _note(name: str, calls: dict[str, Call | None]) -> Any:
    def note(_: Any, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            # A model may go on in the same memory.
            calls[name] = Call(name, *(tensor.flatten(0, -2).clone() for tensor in (given[0], output)))

    return note


def _candidates(family: Family, calls: dict[str, Call], config: Any) -> Iterator[Family]:
    above, parent = (name.rpartition(".")[0] for name in (family.ffn.up, family.ffn.down))
    named = getattr(config, family.activation, None)
    activations = [family.activation] if isinstance(named, str) else []
    sites: list[dict[str, Any]] = [{"read": parent, "write": parent}] if parent and above == parent else []
    # Two modules, of which the second does more than the FFN.
    sites += [{"read": above, "write": family.ffn.down}] if above and above != parent else []
    order = [name for name in calls if not any(other.startswith(f"{name}.") for other in calls)]
    if family.ffn.gate is None and {family.ffn.up, family.ffn.down} <= set(order):
        # The block's own matrices, or those of a module that does more than the FFN.
        between = tuple(order[order.index(family.ffn.up) + 1 : order.index(family.ffn.down)])
        sites.append({"read": family.ffn.up, "write": family.ffn.down, "between": between})
    for activation in (*activations, *ACTIVATIONS):
        for site in sites:
            yield replace(family, activation=activation, **site)


@torch.no_grad()
def _fits(family: Family, block: nn.Module, calls: dict[str, Call], config: Any) -> bool:
    if not {family.read, family.write} <= set(calls):
        return False
    state = {f"0.{name}": tensor for name, tensor in block.state_dict().items()}
    tensors = {name: state[name] for name in tensor_names(family.ffn, "0", state)}
    ffn = unpack(family.ffn, "0", tensors, 0, family.activation_of(config))
    written_TD = calls[family.write].output_TD
    difference = float((ffn(calls[family.read].input_TD) - written_TD).abs().max())
    return difference <= TOLERANCE * float(written_TD.abs().max())
