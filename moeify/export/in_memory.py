"""The parts of a converted model as stock transformers holds them in memory, and the names they have on disk.

Legend: R routed experts, f neurons of one expert, s neurons of the shared part, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moeify.experts.mixing import Mixing
from moeify.experts.slices import SplitFFN
from moeify.export.writer import routed_fold
from moeify.families import Sites, sites_of
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.plan import SplitPlan
from moeify.targets import Modules, Target


def moe_parameters(block: nn.Module, modules: Modules) -> dict[str, Any]:
    """Parameters of one decoder layer's experts, router and shared part, as far as it has them; split ones in one."""
    parts: dict[str, Any] = {}
    if (experts := _part(block, modules.experts)) is not None:
        up = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
        parts = {
            "gate_up": getattr(experts, up),
            "down": experts.down_proj,
            "router": block.get_submodule(modules.router).get_parameter(modules.router_weight),
        }
        router = block.get_submodule(modules.router)
        hidden: list[Any] = [getattr(router, name, None) for name in modules.router_hidden]
        if hidden and hidden[0] is not None:
            parts["router_units"] = torch.cat([hidden[0], hidden[1][:, None]], 1)
        if (threshold_R := getattr(router, "threshold", None)) is not None:
            parts["threshold"] = threshold_R
        if hasattr(experts, f"{up}_bias"):
            parts["gate_up_bias"] = getattr(experts, f"{up}_bias")
    bias_D = getattr(block.get_submodule(modules.experts.rpartition(".")[0]), "bias", None)
    if bias_D is not None:
        parts["bias"] = bias_D
    if (shared := _part(block, modules.shared)) is not None:
        maps = [shared.get_submodule(name) for name in modules.shared_gate_up]
        parts["shared_gate_up"] = torch.cat([linear.weight for linear in maps])
        parts["shared_down"] = shared.get_submodule(modules.shared_down).weight
        if maps[0].bias is not None:
            parts["shared_gate_up_bias"] = torch.cat([linear.bias for linear in maps])
    return parts


def _part(block: nn.Module, name: str) -> Any:
    """A module in a block, such as its experts, or the part that is always on; None if it has none."""
    part: Any = block
    for step in name.split(".") if name else ():
        part = getattr(part, step, None)
    return part if name else None


def sites_of_target(target: Target) -> tuple[Sites, ...]:
    """Where the FFNs of a converted model read and write: its experts, and the shared part beside them."""
    modules = target.modules
    names = [modules.experts, *([modules.shared] if modules.shared else [])]
    first, *others = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
    return sites_of(target.blocks, first, first, tuple(others))


def split_ffn(block: nn.Module, modules: Modules, layer: int, activation: str) -> SplitFFN:
    """One layer's experts as a target's `ffn_tensors` takes them: folds in the down weights, the router as stored.

    Of a static layer the shared part is all; one without an FFN has none.
    """
    parts = {name: tensor.detach() for name, tensor in moe_parameters(block, modules).items()}
    experts = _part(block, modules.experts)
    gated = len(modules.shared_gate_up) > 1 if experts is None else hasattr(experts, "gate_up_proj")

    def ffn(down_DF: Tensor, rows: Tensor, biases: Tensor | None, dim: int) -> FFNWeights:
        gate, up = rows.chunk(2, dim=dim) if gated else (None, rows)
        gate_bias, up_bias = (None, biases) if biases is None or not gated else biases.chunk(2, dim=dim)
        flat = [None if part is None else part.flatten(0, dim) for part in (gate, up, gate_bias, up_bias)]
        assert flat[1] is not None
        return FFNWeights(layer, flat[0], flat[1], down_DF, activation, flat[2], flat[3], parts.get("bias"))

    shared = None
    if "shared_down" in parts:
        shared = ffn(parts["shared_down"], parts["shared_gate_up"], parts.get("shared_gate_up_bias"), 0)
    if experts is None:
        assert shared is not None
        return SplitFFN(shared, shared.neurons(slice(0)), shared.up_FD[:0])
    routed = ffn(parts["down"].transpose(0, 1).flatten(1), parts["gate_up"], parts.get("gate_up_bias"), 1)
    shared = routed.neurons(slice(0)) if shared is None else shared
    return SplitFFN(shared, routed, parts["router"], parts.get("router_units"), parts.get("threshold"))


def on_disk(model: nn.Module, target: Target | None, routed_layers: list[int]) -> dict[str, Tensor]:
    """Every tensor of the model under its name in the checkpoint.

    Args:
        model: as stock transformers loaded it.
        target: its architecture; None for a dense one, whose names are the same in memory and on disk.
        routed_layers: layers with experts that are chosen.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if target is None:
        return tensors
    for layer in routed_layers:
        prefix = target.block(layer)
        experts = split_ffn(model.get_submodule(prefix), target.modules, layer, "")
        # Constants that a target writes, such as selection biases, are the model's own by now; what has another shape
        # there lies turned on disk.
        written = target.ffn_tensors(prefix, experts)
        tensors |= {n: t for n, t in written.items() if n not in tensors or t.shape != tensors[n].shape}
    return tensors


def folds(plan: SplitPlan, target: Target, layer: int) -> tuple[float, float]:
    """Factors in the stored down weights of a layer's shared and routed experts."""
    return target.shared_fold, routed_fold(target, plan.layout.of_layer(layer), Mixing.of(plan.options))


def routed_layers(layout: Layout, num_layers: int) -> list[int]:
    """Layers with experts that are chosen."""
    return [layer for layer in range(num_layers) if layout.is_routed(layer)]
