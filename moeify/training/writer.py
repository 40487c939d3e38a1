"""From a trained student to a checkpoint with the names, types and shards of the one it came from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeify.errors import InputError
from moeify.export.companions import settle_companions
from moeify.export.in_memory import moe_parameters, on_disk
from moeify.export.model_card import finetuned_card
from moeify.export.old_config import with_old_keys
from moeify.export.origin import origin_of
from moeify.export.record import RECORD_FILE
from moeify.export.workspace import Workspace
from moeify.export.writer import check_fits
from moeify.modeling.remote_code import code_files
from moeify.models.config import CONFIG_FILE
from moeify.models.files import FLOAT_DTYPES, INDEX_FILE, find_shards, inside
from moeify.models.heads import auto_name
from moeify.plan import SplitPlan
from moeify.training.inputs import Inputs
from moeify.training.model import Student
from moeify.training.options import FinetuneOptions


def write_trained(student: Student, inputs: Inputs, options: FinetuneOptions, workspace: Workspace) -> None:
    """Write shards, plan, record and card.

    Raises:
        InputError: a trained value does not fit the checkpoint's type, or a file leads out of the student's folder.
    """
    values = on_disk(student.model, student.target, student.routed_layers)
    shards = find_shards(inputs.path)
    for file in sorted(set(shards.values())):
        names = [name for name, shard in shards.items() if shard == file]
        missing = [name for name in names if name not in values]
        if missing:
            raise InputError(f"{file} has {missing[0]}, which the loaded model has not", "split the dense model again")
        with safe_open(file, framework="pt") as reader:
            types = {name: FLOAT_DTYPES[reader.get_slice(name).get_dtype()] for name in names}
        tensors = {name: values[name].to(types[name]).contiguous() for name in names}
        for name, tensor in tensors.items():
            check_fits(name, tensor)
        # Tied parameters share memory, which safetensors refuses.
        workspace.write_tensors(file.name, {n: t.clone() for n, t in tensors.items()}, {"format": "pt"})
    if (inputs.path / INDEX_FILE).is_file():
        workspace.copy(inside(inputs.path, INDEX_FILE), INDEX_FILE)
    # An earlier moeify, and whoever wrote a dense student, may have left the names of transformers 4 out.
    config_text = with_old_keys(inside(inputs.path, CONFIG_FILE).read_text("utf-8"))
    workspace.write_text(CONFIG_FILE, config_text)
    settle_companions(inputs.path, config_text).write(workspace)
    if inputs.plan is not None:
        for name, content in code_files().items() if inputs.plan.options.remote_code else ():
            workspace.write_bytes(name, content)
        workspace.write_plan(_trained_plan(student, inputs.plan, options, _dtype(shards)))
    config = json.loads(config_text)
    trained = (*(inputs.plan.trained if inputs.plan else ()), *options.stage)
    card = finetuned_card(
        inputs.name,
        inputs.teacher.name,
        config,
        asdict(options),
        inputs.provenance,
        trained=trained,
        plan=inputs.plan,
        origin=origin_of(inputs.path),
        auto=auto_name(student.model.config),
    )
    workspace.write_record(_sizes(inputs.path), card)


def _trained_plan(student: Student, plan: SplitPlan, options: FinetuneOptions, dtype: torch.dtype) -> SplitPlan:
    """The plan with the routers as they are now."""
    layers = list(plan.layers)
    if student.target is not None:
        for layer in student.routed_layers:
            block = student.model.get_submodule(student.target.block(layer))
            parts = moe_parameters(block, student.target.modules)
            stored_RD, units_HC = parts["router"].detach().to(dtype), parts.get("router_units")
            units_HC = None if units_HC is None else units_HC.detach().to(dtype)
            threshold_R = parts.get("threshold")
            if threshold_R is not None:
                threshold_R = _unscaled(threshold_R.detach().to(dtype), student.scale)
            router_RD = _unscaled(stored_RD, student.scale)
            layers[layer] = replace(layers[layer], router_RD=router_RD, units_HC=units_HC, threshold_R=threshold_R)
    return replace(plan, layers=tuple(layers), trained=(*plan.trained, *options.stage))


def _unscaled(stored_RD: Tensor, scale: float) -> Tensor:
    """Rows that give the stored ones again; exact in the stored type if the scale is a power of two."""
    router_RD = stored_RD / scale
    return router_RD if torch.equal(router_RD * scale, stored_RD) else stored_RD.double() / scale


def _dtype(shards: Mapping[str, Path]) -> torch.dtype:
    """Of the weights: every tensor but a few constants has it."""
    name = next(name for name in sorted(shards) if name.endswith(".weight"))
    with safe_open(shards[name], framework="pt") as reader:
        return FLOAT_DTYPES[reader.get_slice(name).get_dtype()]


def _sizes(path: Path) -> dict[str, Any]:
    """Numbers of parameters, as the split recorded them."""
    if not (path / RECORD_FILE).is_file():
        return {}
    record = json.loads((path / RECORD_FILE).read_text())
    return {key: record[key] for key in ("parameters", "active_parameters") if key in record}
