"""The parts of a converted model as stock transformers holds them in memory, and the names they have on disk.

Legend: R routed experts, f neurons of one expert, s neurons of the shared part, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moeify.experts.mixing import Mixing
from moeify.experts.slices import SplitFFN
from moeify.export.writer import routed_fold
from moeify.families import Sites
from moeify.models.ffn import FFNWeights
from moeify.plan import Layout, SplitPlan
from moeify.targets import Modules, Target


def moe_parameters(block: nn.Module, modules: Modules) -> dict[str, Any]:
    """Parameters of one decoder layer's experts, router and, if it has one, shared part, concatenated where split."""
    experts: Any = block.get_submodule(modules.experts)
    parts: dict[str, Any] = {
        "gate_up": experts.gate_up_proj,
        "down": experts.down_proj,
        "router": block.get_submodule(modules.router).get_parameter(modules.router_weight),
    }
    if modules.shared and getattr(block, modules.shared.split(".")[0]) is not None:
        shared = block.get_submodule(modules.shared)
        parts["shared_gate_up"] = torch.cat([_weight(shared, name) for name in modules.shared_gate_up])
        parts["shared_down"] = _weight(shared, modules.shared_down)
    return parts


def sites_of(target: Target) -> Sites:
    """Where the FFN of a converted model's blocks reads and writes: its experts, and the shared part beside them."""
    modules = target.modules
    names = [modules.experts, *([modules.shared] if modules.shared else [])]
    first, *others = dict.fromkeys(name.split(".")[0] for name in names)
    return Sites(target.blocks, first, first, tuple(others))


def split_ffn(block: nn.Module, modules: Modules, layer: int, activation: str) -> SplitFFN:
    """One layer's experts as a target's `ffn_tensors` takes them: folds in the down weights, the router as stored."""
    parts = {name: tensor.detach() for name, tensor in moe_parameters(block, modules).items()}
    gate_FD, up_FD = (rows_RfD.flatten(0, 1) for rows_RfD in parts["gate_up"].chunk(2, dim=1))
    routed = FFNWeights(layer, gate_FD, up_FD, parts["down"].transpose(0, 1).flatten(1), activation)
    shared = routed.neurons(slice(0))
    if "shared_down" in parts:
        gate_sD, up_sD = parts["shared_gate_up"].chunk(2)
        shared = FFNWeights(layer, gate_sD, up_sD, parts["shared_down"], activation)
    return SplitFFN(shared, routed, parts["router"])


def on_disk(model: nn.Module, target: Target | None, cut_layers: list[int]) -> dict[str, Tensor]:
    """Every tensor of the model under its name in the checkpoint.

    Args:
        model: as stock transformers loaded it.
        target: its architecture; None for a dense one, whose names are the same in memory and on disk.
        cut_layers: layers that have experts.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if target is None:
        return tensors
    for layer in cut_layers:
        prefix = target.block(layer)
        experts = split_ffn(model.get_submodule(prefix), target.modules, layer, "")
        # Constants that a target writes, such as selection biases, are the model's own by now.
        written = target.ffn_tensors(prefix, experts)
        tensors |= {name: tensor for name, tensor in written.items() if name not in tensors}
    return tensors


def folds(plan: SplitPlan, target: Target) -> tuple[float, float]:
    """Factors in the stored down weights of the shared and of the routed experts."""
    return target.shared_fold, routed_fold(target, plan.layout, Mixing.of(plan.options))


def cut_layers(layout: Layout, num_layers: int) -> list[int]:
    """Layers that are not left dense."""
    return [layer for layer in range(num_layers) if layer not in layout.dense_layers]


def _weight(module: nn.Module, part: str) -> Any:
    return module.get_submodule(part).weight
