"""Whether a layer of a model can go: toy twins with one layer bypassed and with one layer fewer are compared.

The twin has the model's very config but for its sizes (see exactness.py), and every kind of layer. In the first one the
block is there and its input is taken for its output; the second one is what would be written.
"""

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from moeify.convert.exactness import STOPS, TOLERANCE, Twin, make_twin, twin_inputs, twin_values
from moeify.errors import InputError, first_line
from moeify.models.dense import DenseModel
from moeify.models.heads import auto_class
from moeify.models.inputs import output_of, uncached
from moeify.models.shallow import cut_names, kept_layers, without_layers


def check_droppable(dense: DenseModel) -> None:
    """Refuse a model that is another one, not a shallower one, when a layer goes.

    Raises:
        InputError: twins differ, or cannot be built.
    """
    if dense.family.is_pair:
        raise InputError(
            f"{dense.name} has an encoder and a decoder, of which no layers can be dropped", "leave --drop-layers out"
        )
    values = json.dumps(twin_values(dense.config, dense.family), sort_keys=True, default=str)
    if reason := _difference(values):
        raise InputError(f"no layer of a {dense.config.model_type} can be dropped: {reason}", "leave --drop-layers out")


@lru_cache(maxsize=64)
def _difference(values: str) -> str:
    """Why the twins of this config are not the same, or ""."""
    try:
        twin = make_twin(json.loads(values))
        for layer in range(twin.num_layers):
            expected, shallow = _outputs(twin, bypassed=layer), _outputs(_without(twin, layer))
            difference = float((expected - shallow).abs().max() / expected.abs().max())
            if not difference <= TOLERANCE:
                return f"without layer {layer} a toy twin's outputs differ by {difference:.2g} of the largest"
    except STOPS as error:
        return f"a toy twin cannot be built: {first_line(error):.160}"
    return ""


def _without(twin: Twin, layer: int) -> Twin:
    kept = kept_layers(twin.num_layers, [layer])
    shallow = without_layers(twin, [layer])
    assert isinstance(shallow, Twin)
    return replace(shallow, tensors=cut_names(twin.tensors, twin.blocks.names[0], kept))


@torch.no_grad()
def _outputs(twin: Twin, bypassed: int | None = None) -> Tensor:
    """Outputs of the stock model, with one block bypassed."""
    model: Any = auto_class(twin.config).from_config(twin.config).eval()
    model.load_state_dict(dict(twin.tensors), strict=False)
    if bypassed is not None:
        block: nn.Module = model.get_submodule(twin.blocks.block(bypassed))
        block.register_forward_hook(_bypass, with_kwargs=True)
    return output_of(model(**twin_inputs(twin), **uncached(model)))[0]


def _bypass(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    hidden = arguments[0] if arguments else named["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
