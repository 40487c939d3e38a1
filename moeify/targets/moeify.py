"""moeify's own architecture: the dense model's class, its FFNs replaced; for models that no stock architecture holds.

It takes what no stock one does: biases, experts without a gate, any attention and any head. The weight of a chosen
expert is exactly one. It loads where moeify is imported, or with the code beside the weights.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeify.experts.slices import SplitFFN
from moeify.families import Blocks, Family, lists_of
from moeify.layout import Layout
from moeify.modeling.configuration_moeify import MODEL_TYPE
from moeify.models.dense import DenseModel
from moeify.models.ffn import FFNWeights
from moeify.targets import Modules, Target, as_it_is

# Parameters of a router's hidden layer.
HIDDEN = ("hidden_weight", "hidden_bias")


def config(dense: DenseModel, layout: Layout, width: int) -> dict[str, Any]:
    family, ffn = dense.family, dense.ffn_shapes
    own = [layout.of_layer(layer) for layer in range(dense.num_layers)]
    # Thresholds say how many an adaptive layer chooses; one that stays dense has none to choose.
    by_layer = [] if layout.is_adaptive else [one.num_routed_active for one in own]
    if not (layout.active_by_layer or layout.is_mixed):
        by_layer = []
    return {
        **dense.config.to_dict(),
        "dense_model_type": family.model_type,
        "num_experts": layout.num_routed,
        # Of a model whose layers are all static the number means nothing.
        "num_experts_per_tok": max(1, *by_layer) if by_layer else layout.routed_range[1],
        "num_experts_per_tok_by_layer": by_layer or None,
        "min_experts_per_tok": layout.routed_range[0] if layout.is_adaptive else None,
        "ffn_by_layer": [_ffn(one, dense) for one in own] if layout.is_mixed else None,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": layout.num_shared * width,
        "dense_layers": list(layout.dense_layers),
        "expert_activation": dense.activation,
        "expert_gate": ffn.gate_FD is not None,
        "expert_bias": ffn.up_bias_F is not None or ffn.gate_bias_F is not None,
        "output_bias": ffn.down_bias_D is not None,
        "ffn_blocks": family.blocks if isinstance(family.blocks, str) else list(family.blocks),
        "ffn_read": family.read,
        "ffn_write": family.write,
        "ffn_between": list(family.between),
    }


def _ffn(layout: Layout, dense: DenseModel) -> dict[str, int]:
    """What a layer of this layout has in place of the model's own values; one that stays dense has no experts."""
    width = layout.expert_width(dense.num_neurons)
    values = {"num_experts": 0, "shared_expert_intermediate_size": 0 if layout.is_whole else layout.num_shared * width}
    if layout.is_static:
        return values
    values |= {"num_experts": layout.num_routed, "moe_intermediate_size": width}
    if not layout.is_adaptive:
        return values
    least, most = layout.routed_range
    return values | {"num_experts_per_tok": most, "min_experts_per_tok": least}


def ffn_tensors(site: str, ffn: SplitFFN) -> dict[str, Tensor]:
    """Names and values of one layer, given the name of the module that the experts stand for; of a static one less."""
    experts, routed, shared = f"{site}.experts", ffn.routed, ffn.shared
    up = "up_proj" if routed.gate_FD is None else "gate_up_proj"
    tensors: dict[str, Tensor] = {}
    if ffn.num_routed:
        tensors = {
            f"{site}.router.weight": ffn.router_RD,
            **_hidden_layer(f"{site}.router", ffn.units_HC),
            **({} if ffn.threshold_R is None else {f"{site}.router.threshold": ffn.threshold_R}),
            f"{experts}.{up}": _by_expert(_rows(routed), ffn.num_routed),
            f"{experts}.down_proj": ffn.down_RDf,
        }
        if (bias_P := _biases(routed)) is not None:
            tensors[f"{experts}.{up}_bias"] = _by_expert(bias_P, ffn.num_routed)
    if routed.down_bias_D is not None:
        tensors[f"{site}.bias"] = routed.down_bias_D
    if shared.num_neurons:
        tensors |= _shared(f"{site}.shared", shared)
    return tensors


def _hidden_layer(router: str, units_HC: Tensor | None) -> dict[str, Tensor]:
    if units_HC is None:
        return {}
    return {f"{router}.{name}": part for name, part in zip(HIDDEN, (units_HC[:, :-1], units_HC[:, -1]), strict=True)}


def _rows(ffn: FFNWeights) -> list[Tensor]:
    return [ffn.up_FD] if ffn.gate_FD is None else [ffn.gate_FD, ffn.up_FD]


def _biases(ffn: FFNWeights) -> list[Tensor] | None:
    """Of the rows; zeros for one of both that has none."""
    given = [ffn.up_bias_F] if ffn.gate_FD is None else [ffn.gate_bias_F, ffn.up_bias_F]
    if all(bias_F is None for bias_F in given):
        return None
    return [ffn.up_FD.new_zeros(ffn.num_neurons) if bias_F is None else bias_F for bias_F in given]


def _by_expert(parts: list[Tensor], num_experts: int) -> Tensor:
    """The parts' rows of each expert, one part behind the other."""
    return torch.cat([part.unflatten(0, (num_experts, -1)) for part in parts], dim=1)


def _shared(name: str, ffn: FFNWeights) -> dict[str, Tensor]:
    modules = ["up_proj"] if ffn.gate_FD is None else ["gate_proj", "up_proj"]
    tensors = {f"{name}.{module}.weight": rows for module, rows in zip(modules, _rows(ffn), strict=True)}
    if (biases := _biases(ffn)) is not None:
        tensors |= {f"{name}.{module}.bias": bias_F for module, bias_F in zip(modules, biases, strict=True)}
    return {**tensors, f"{name}.down_proj.weight": ffn.down_DF}


TARGET = Target(
    model_type=MODEL_TYPE,
    architecture="",
    preference=100,
    holds_shared=True,
    engines=(),
    is_stock=False,
    mixings=("hard", "softmax", "soft"),
    exact_weights=True,
    config=config,
    routed_fold=lambda layout: 1.0,
    ffn_tensors=lambda prefix, ffn: ffn_tensors(f"{prefix}.mlp", ffn),
    carry=as_it_is,
    modules=Modules(experts="mlp.experts", router="mlp.router", router_hidden=HIDDEN),
)


def of(family: Family, blocks: Blocks | None = None) -> Target:
    """The target for models of a family: names are the family's.

    Args:
        family: the dense model's.
        blocks: of the model, where it is known.
    """
    site, rows = family.read, ("gate_proj", "up_proj") if family.ffn.gate else ("up_proj",)
    return replace(
        TARGET,
        blocks=blocks or Blocks(lists_of(family.blocks)),
        dense_ffn=family.ffn,
        ffn_tensors=lambda prefix, ffn: ffn_tensors(f"{prefix}.{site}", ffn),
        modules=Modules(
            experts=f"{site}.experts",
            router=f"{site}.router",
            router_hidden=HIDDEN,
            shared=f"{site}.shared",
            shared_gate_up=rows,
            shared_down="down_proj",
        ),
    )
