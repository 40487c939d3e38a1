"""The pipeline: a dense checkpoint in, a mixture-of-experts checkpoint out. This file alone knows the order.

Legend: T tokens, D hidden size.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from moeify import partition
from moeify.calibration.gradients import output_gradients
from moeify.convert.estimate import count_parameters
from moeify.convert.layer import converted, fit_layer
from moeify.convert.prepare import Prepared, calibration_text, prepare
from moeify.convert.search import under_budget
from moeify.convert.walk import CalibrationWalk
from moeify.data.text import TokenBlocks
from moeify.errors import UsageError
from moeify.experts.slices import SplitFFN, slice_experts
from moeify.export.companions import settle_companions
from moeify.export.model_card import model_card
from moeify.export.workspace import LAST_FILE, RECORD_FILE, Workspace, check_replaceable
from moeify.models.dense import DenseModel, open_dense
from moeify.models.generation import usable_generation
from moeify.models.tokenizer import has_tokenizer
from moeify.options import SplitOptions, Track, untracked
from moeify.plan import LayerPlan, Layout, SplitPlan, load_plan
from moeify.version import __version__


@dataclass(frozen=True)
class SplitResult:
    """What was written.

    Args:
        out: the new checkpoint.
        target: its architecture; `target_reason` says why it was taken.
        layout: experts, shared, active.
        num_parameters, num_active_parameters: of the whole model; active ones are multiplied for every token.
        plan: the decisions, with diagnostics for each layer.
    """

    out: Path
    target: str
    target_reason: str
    layout: Layout
    num_parameters: int
    num_active_parameters: int
    plan: SplitPlan


def split(
    model: str | Path | DenseModel,
    out: str | Path,
    options: SplitOptions | None = None,
    *,
    overwrite: bool = False,
    track: Track[Any] = untracked,
    announce: Callable[[float], None] = lambda _: None,
) -> SplitResult:
    """Convert a dense checkpoint into a native mixture-of-experts checkpoint.

    Args:
        model: a folder, a .gguf file, a hub id, `builtin`, or a model that is open already.
        out: where the checkpoint goes; appears only when it is complete.
        options: how to cut.
        overwrite: replace an earlier result at `out` once the new one is complete.
        track: wraps long loops to show progress.
        announce: told the expected seconds of the search for layers, if the options have a budget.

    Raises:
        InputError: the model, the text or the place is not usable; `out` is untouched.
    """
    out = Path(out)
    options = options or SplitOptions()
    dense = open_dense(model, track)
    _check_companions(dense)
    if options.budget is not None:
        check_replaceable(out, overwrite=overwrite)
        options = under_budget(dense, options, track, announce)
    prepared = prepare(dense, options)
    if out.resolve() == prepared.dense.path.resolve():
        raise UsageError(f"{out} is the dense model itself", "choose another -o")
    check_replaceable(out, overwrite=overwrite)
    # Before any work: a tokenizer that would cut text otherwise is a refusal.
    companions = settle_companions(dense.path, prepared.writer.config_text())
    blocks = calibration_text(prepared) if prepared.needs_text else None
    calibration = asdict(blocks.provenance) if blocks else {}
    with Workspace(out, _job(prepared, calibration), overwrite=overwrite) as workspace:
        if not workspace.is_complete:
            layers = track(decide_layers(prepared, blocks, workspace), "splitting layers", prepared.dense.num_layers)
            # The refit columns stay on disk until their shard is written.
            kept = tuple(replace(layer, down_DF=None) for layer in layers)
            companions.write(workspace)
            _write(prepared, workspace, kept, calibration, track)
        workspace.commit()
    sizes = count_parameters(prepared.writer)
    reason = prepared.target_reason
    return SplitResult(out, prepared.target.model_type, reason, prepared.layout, *sizes, load_plan(out))


def _check_companions(dense: DenseModel) -> None:
    """Refuse a tokenizer of no use and warn of broken files beside it, before any work; a model may have none."""
    usable_generation(dense.path)
    if has_tokenizer(dense.path):
        dense.tokenizer()


def _write(
    prepared: Prepared,
    workspace: Workspace,
    layers: tuple[LayerPlan, ...],
    calibration: dict[str, Any],
    track: Track[Any],
) -> None:
    """Everything that the finished folder holds."""
    plan, writer = _plan(prepared, layers, calibration), prepared.writer

    def experts_of(layer: int) -> SplitFFN:
        ffn = prepared.dense.ffn(layer).map(lambda tensor: tensor.to(prepared.dtype))
        # With the refit columns, which stay on disk until their shard is written.
        return slice_experts(ffn, workspace.load_layer(layer) or layers[layer], prepared.layout)

    writer.write(workspace, experts_of, track)
    workspace.write_plan(plan)
    parameters, active = count_parameters(writer)
    record = {"schema": "moeify.record/1", "job": workspace.job, "parameters": parameters, "active_parameters": active}
    workspace.write_text(RECORD_FILE, json.dumps(record, indent=1, sort_keys=True) + "\n")
    workspace.write_text(LAST_FILE, model_card(plan, writer.config().architectures[0], (parameters, active)))


def decide_layers(prepared: Prepared, blocks: TokenBlocks | None, workspace: Workspace) -> Iterator[LayerPlan]:
    """Yield a plan for each layer in order; layers finished earlier are replayed, not fitted again."""
    saved = prepared.saved_plan
    if blocks is None:
        assert saved is not None
        yield from saved.layers
        return
    fit, gradients = prepared.fit(), []
    if saved is None and partition.needs_gradients(prepared.options.partition):
        gradients = output_gradients(prepared.dense, blocks.ids_BC, prepared.options.device)
    walk = CalibrationWalk(prepared, blocks.ids_BC, gradients=gradients)
    for layer in range(prepared.dense.num_layers):
        stage = walk.enter(layer)
        plan = workspace.load_layer(layer)
        if plan is None:
            again = saved.layers[layer] if saved else None
            fitted, outputs_TD = fit_layer(
                stage.ffn, stage.inputs_TD, fit, again, gradient_GD=stage.gradient_GD, goal_TD=stage.goal_TD
            )
            plan = fitted.plan
            workspace.save_layer(plan)
        else:
            outputs_TD = converted(stage.ffn, plan, fit)(stage.inputs_TD)
        walk.leave(outputs_TD)
        yield plan
    walk.stream.check_head()


def _plan(prepared: Prepared, layers: tuple[LayerPlan, ...], calibration: dict[str, Any]) -> SplitPlan:
    return SplitPlan(
        layout=prepared.layout,
        layers=layers,
        source=prepared.dense.name,
        family=prepared.dense.family.model_type,
        target=prepared.target.model_type,
        options=prepared.options,
        calibration=calibration,
        version=__version__,
    )


def _job(prepared: Prepared, calibration: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began."""
    return {
        "model": prepared.dense.fingerprint(),
        "options": asdict(prepared.options),
        "target": prepared.target.model_type,
        "dtype": str(prepared.dtype),
        "calibration": calibration,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {"moeify": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
