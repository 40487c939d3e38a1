"""The parts of a converted model as stock transformers holds them in memory, and the names they have on disk.

Legend: R routed experts, f neurons of one expert, s neurons of the shared part, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moeify.experts.mixing import Mixing
from moeify.export.writer import routed_fold
from moeify.plan import Layout, SplitPlan
from moeify.targets import ROUTER_SCALE, Modules, SplitFFN, Target


def moe_parameters(block: nn.Module, modules: Modules) -> dict[str, Any]:
    """Parameters of one decoder layer's experts, router and, if it has one, shared part, concatenated where split."""
    experts: Any = block.get_submodule(modules.experts)
    found: dict[str, Any] = {
        "gate_up": experts.gate_up_proj,
        "down": experts.down_proj,
        "router": block.get_submodule(modules.router).weight,
    }
    if modules.shared and getattr(block, modules.shared.split(".")[0]) is not None:
        shared = block.get_submodule(modules.shared)
        found["shared_gate_up"] = torch.cat([_weight(shared, part) for part in modules.shared_gate_up])
        found["shared_down"] = _weight(shared, modules.shared_down)
    return found


def ffn_modules(modules: Modules) -> tuple[str, ...]:
    """Attributes of a decoder layer that make up its FFN; the first one always has an input."""
    names = [modules.experts or "mlp", *([modules.shared] if modules.shared else [])]
    return tuple(dict.fromkeys(name.split(".")[0] for name in names))


def split_ffn(block: nn.Module, modules: Modules) -> SplitFFN:
    """One layer's FFN as a target's `ffn_tensors` takes it: folds in the down weights, the router as it is stored."""
    parts = moe_parameters(block, modules)
    gate_RfD, up_RfD = parts["gate_up"].detach().chunk(2, dim=1)
    hidden = gate_RfD.shape[2]
    shared_gate_up = parts.get("shared_gate_up", gate_RfD.new_zeros(0, hidden)).detach()
    gate_sD, up_sD = shared_gate_up.chunk(2) if len(shared_gate_up) else (shared_gate_up, shared_gate_up)
    return SplitFFN(
        gate_sD=gate_sD,
        up_sD=up_sD,
        down_Ds=parts.get("shared_down", gate_RfD.new_zeros(hidden, 0)).detach(),
        gate_RfD=gate_RfD,
        up_RfD=up_RfD,
        down_RDf=parts["down"].detach(),
        router_RD=parts["router"].detach(),
    )


def router_scale(plan: SplitPlan) -> float:
    """What a router's scores were multiplied with when they were written."""
    mixing = Mixing.of(plan.options)
    return ROUTER_SCALE if mixing.style == "hard" else 1 / mixing.temperature


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
    layers: Any = model.get_submodule("model.layers")
    for layer in cut_layers:
        prefix = f"model.layers.{layer}"
        found = target.ffn_tensors(prefix, split_ffn(layers[layer], target.modules))
        # What a target writes as a constant, such as selection biases, is the model's own by now.
        tensors |= {name: tensor for name, tensor in found.items() if name not in tensors}
    return tensors


def folds(plan: SplitPlan, target: Target) -> tuple[float, float]:
    """Factors in the stored down weights of the shared and of the routed experts."""
    return target.shared_fold, routed_fold(target, plan.layout, Mixing.of(plan.options))


def cut_layers(layout: Layout, num_layers: int) -> list[int]:
    """Layers that are not left dense."""
    return [layer for layer in range(num_layers) if layer not in layout.dense_layers]


def _weight(module: nn.Module, part: str) -> Any:
    return module.get_submodule(part).weight
