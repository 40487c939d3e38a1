"""Whether a checkpoint holds what its plan says, on disk and as stock transformers loads it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeify.experts.mixing import Mixing
from moeify.experts.slices import slice_experts
from moeify.export.in_memory import split_ffn
from moeify.export.writer import MoEWriter
from moeify.models.config import load_config
from moeify.models.dense import DenseModel
from moeify.models.ffn import FFNWeights
from moeify.models.files import find_shards
from moeify.plan import SHARED, LayerPlan, SplitPlan
from moeify.targets import Target

# Stages of fine-tuning that change routers and down_proj alone.
KEEPS_NEURONS = {"layers", "router"}


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    found: str
    expected: str
    passed: bool


def place_checks(model: Any, source: DenseModel, plan: SplitPlan, target: Target, stored: torch.dtype) -> list[Check]:
    """Mixing and up rows must be the dense rows, bit for bit, each in exactly one place."""
    placed, equal, total = 0, 0, 0
    for layer in cut_layers(plan):
        own, ffn = plan.layout.of_layer(layer.layer), source.ffn(layer.layer)
        ffn = ffn.map(lambda tensor: tensor.to(stored).float())
        # Of a static layer what is left: the others have no place.
        experts = [SHARED] if own.is_static else range(SHARED, own.num_routed)
        order = torch.cat([layer.neurons(expert) for expert in experts])
        total, placed = total + own.num_slices * own.expert_width(ffn.num_neurons), placed + order.unique().numel()
        planned = slice_experts(ffn, layer, plan.layout)
        block = model.get_submodule(target.block(layer.layer))
        loaded = split_ffn(block, target.modules, layer.layer, source.activation)
        for part, written in ((loaded.shared, planned.shared), (loaded.routed, planned.routed)):
            if part.num_neurons == written.num_neurons:
                equal += int(_same_rows(part, written).sum())
    return [
        Check("every neuron has one place", f"{placed:,}", f"{total:,}", placed == total),
        Check("gate and up rows are the dense ones", f"{equal:,} equal", f"{total:,}", equal == total),
    ]


def cut_layers(plan: SplitPlan) -> list[LayerPlan]:
    """Those of which something was cut and something is left."""
    own = {layer.layer: plan.layout.of_layer(layer.layer) for layer in plan.layers}
    return [layer for layer in plan.layers if not own[layer.layer].is_whole and not own[layer.layer].is_empty]


def _same_rows(loaded: FFNWeights, planned: FFNWeights) -> Tensor:
    """Which neurons have the same gate and up rows in both."""
    same_F = (loaded.up_FD == planned.up_FD).all(1)
    if loaded.gate_FD is None or planned.gate_FD is None:
        return same_F & (loaded.gate_FD is planned.gate_FD)
    return same_F & (loaded.gate_FD == planned.gate_FD).all(1)


def stored_checks(path: Path, source: DenseModel, plan: SplitPlan, target: Target) -> list[Check]:
    """What the plan decides must be on disk bit for bit; what a refit computed must at least be finite."""
    config = load_config(path)
    mixing, code = Mixing.of(plan.options), plan.options.remote_code
    writer = MoEWriter(source, target, plan.layout, config.dtype, mixing, plan.router_scale, code, plan.router_width)
    shards, total = find_shards(path), 0
    wrong: list[str] = []
    for decided in plan.layers:
        ffn, layer = source.ffn(decided.layer).map(lambda tensor: tensor.to(config.dtype)), decided
        if (plan.options.refit or plan.trained) and not plan.layout.of_layer(layer.layer).is_whole:
            layer = replace(layer, down_DF=torch.full_like(ffn.down_DF, torch.nan))
        free = _trained_names(writer, ffn, layer, plan)
        for name, planned_values in writer.layer(layer.layer, slice_experts(ffn, layer, plan.layout)).items():
            total += 1
            expected = torch.full_like(planned_values, torch.nan) if name in free else planned_values
            found = torch.empty(0)
            if name in shards:
                with safe_open(shards[name], framework="pt") as reader:
                    found = reader.get_tensor(name)
            expected = expected.to(found.dtype)
            if found.shape != expected.shape or not (found.isfinite() & (expected.isnan() | (found == expected))).all():
                wrong.append(name)
    declared, planned = config.to_dict(), writer.config().to_dict()
    differs = [key for key, value in planned.items() if declared.get(key) != value and not key.startswith("_")]
    equal = f"{total - len(wrong):,} equal" + (f", not {wrong[0]}" if wrong else "")
    return [
        Check("experts and routers are the plan's", equal, f"{total:,}", not wrong),
        Check("config is the plan's", ", ".join(differs) or "equal", "equal", not differs),
    ]


def _trained_names(writer: MoEWriter, ffn: FFNWeights, layer: LayerPlan, plan: SplitPlan) -> set[str]:
    """Tensors of a layer that the plan does not decide, because training changed them."""
    if not plan.trained:
        return set()
    experts = slice_experts(ffn, layer, plan.layout)
    # Without NaN only what no neuron and no router is in: constants that training may have moved.
    if layer.router_RD is None:
        return set(writer.layer(layer.layer, experts)) if not set(plan.trained) <= KEEPS_NEURONS else set()
    unknown = replace(experts, router_RD=torch.full_like(layer.router_RD, torch.nan))
    marked = writer.layer(layer.layer, unknown)
    routers = {
        name for name, tensor in marked.items() if tensor.isnan().all() and tensor.shape == layer.router_RD.shape
    }
    if set(plan.trained) <= KEEPS_NEURONS:
        return {name for name, tensor in marked.items() if tensor.ndim == 1}
    return set(marked) - routers
