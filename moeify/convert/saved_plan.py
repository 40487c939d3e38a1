"""A plan that was saved: what it decides of a further split, and whether it is of the model."""

from dataclasses import replace

import torch

from moeify.errors import InputError
from moeify.models.dense import DenseModel
from moeify.options import SplitOptions
from moeify.plan import SplitPlan


def options_of(saved: SplitPlan, options: SplitOptions) -> SplitOptions:
    """The options with the layout of the plan."""
    layout, before = saved.layout, saved.options
    return replace(
        options,
        experts=layout.num_experts,
        shared=layout.num_shared,
        active=None if layout.active_by_layer else layout.num_active,
        min_active=layout.min_active or None,
        max_active=layout.max_active or None,
        **{name: getattr(before, name) for name in ("active_by_layer", "experts_by_layer")},
        **{name: getattr(before, name) for name in ("dense_layers", "static_layers", "drop_layers")},
    )


def again(plan: SplitPlan, dtype: torch.dtype, *, refit: bool) -> SplitPlan:
    """A saved plan for a split in this type; the first one may have been in another."""
    layers = (
        replace(
            layer,
            router_RD=None if layer.router_RD is None else layer.router_RD.to(dtype),
            units_HC=None if layer.units_HC is None else layer.units_HC.to(dtype),
            threshold_R=None if layer.threshold_R is None else layer.threshold_R.to(dtype),
        )
        for layer in plan.layers
    )
    if not refit:
        # Its errors are of another checkpoint, whose down_proj was refit.
        layers = (replace(layer, diagnostics={}) for layer in layers)
    return replace(plan, layers=tuple(layers))


def check_plan(plan: SplitPlan, dense: DenseModel) -> None:
    """Raise InputError unless the plan is of a model of this shape."""
    pairs = [
        ("layers", len(plan.layers), dense.num_layers),
        ("neurons a layer", plan.layers[0].labels_F.numel(), dense.num_neurons),
    ]
    routed = next((layer for layer in plan.layers if layer.router_RD is not None), None)
    if routed is not None and routed.router_RD is not None:
        size = routed.router_RD.shape[1] if routed.units_HC is None else routed.units_HC.shape[1] - 1
        pairs.append(("hidden size", size, dense.hidden_size))
    for what, count, expected in pairs:
        if count != expected:
            raise InputError(
                f"the plan is of another model: {what} {count:,}, {dense.name} has {expected:,}",
                f"the plan was made from {plan.source}",
            )
