"""The pipeline: a dense checkpoint in, a mixture-of-experts checkpoint out. This file alone knows the order.

Legend: T tokens, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from moeify import partition
from moeify.calibration.gradients import output_gradients
from moeify.convert.estimate import count_parameters
from moeify.convert.layer import converted, fit_layer, whole_plan
from moeify.convert.prepare import Prepared, calibration_text, prepare
from moeify.convert.search import under_budget
from moeify.convert.walk import CalibrationWalk
from moeify.data.text import TokenBlocks
from moeify.engines import Verdict
from moeify.experts.slices import SplitFFN, slice_experts
from moeify.export.companions import settle_companions
from moeify.export.gguf import check_package
from moeify.export.gguf.result import ExportResult
from moeify.export.model_card import model_card
from moeify.export.origin import origin_of
from moeify.export.record import check_is_no_model, check_out
from moeify.export.workspace import Workspace
from moeify.models.dense import DenseModel, open_dense
from moeify.options import Announce, ExportOptions, SplitOptions, Track
from moeify.plan import LayerPlan, Layout, SplitPlan, load_plan
from moeify.progress import Resumed, said, shown
from moeify.readable import Readable
from moeify.resources import check_room, on_one_disk
from moeify.version import __version__


@dataclass(frozen=True, repr=False)
class SplitResult(Readable):
    """What was written.

    Args:
        out: the new checkpoint.
        target: its architecture; `target_reason` says why it was taken.
        layout: experts, shared, active.
        num_parameters, num_active_parameters: of the whole model; active ones are multiplied for every token.
        plan: the decisions, with diagnostics for each layer.
        engines: what engines that know the target say to the layout.
        gguf: the file for llama.cpp, if there is one.
    """

    out: Path
    target: str
    target_reason: str
    layout: Layout
    num_parameters: int
    num_active_parameters: int
    plan: SplitPlan
    engines: tuple[Verdict, ...]
    gguf: ExportResult | None = None

    @property
    def expert_width(self) -> int:
        """Neurons of one expert."""
        return self.layout.expert_width(self.plan.layers[0].labels_F.numel())


def split(
    model: str | Path | DenseModel,
    out: str | Path,
    options: SplitOptions | None = None,
    *,
    gguf: str | Path | None = None,
    export: ExportOptions | None = None,
    overwrite: bool = False,
    track: Track[Any] = shown,
    announce: Announce = said,
    **choices: Any,
) -> SplitResult:
    """Convert a dense checkpoint into a native mixture-of-experts checkpoint.

    Args:
        model: a folder, a .gguf file, a hub id, `builtin`, or a model that is open already.
        out: where the checkpoint goes; appears only when it is complete.
        options: how to cut.
        gguf: a file for llama.cpp, made of the checkpoint.
        export: how numbers are stored in that.
        overwrite: replace an earlier result at `out` once the new one is complete.
        track: wraps long loops to show progress.
        announce: told the expected time of the search for layers, if the options have a budget.
        choices: single options by name, in place of those in `options`.

    Raises:
        InputError: the model, the text or the place is not usable; `out` is untouched.
        UsageError: options that there are not, or that contradict each other.

    Example:
        result = moeify.split("builtin", "my-moe", experts=8, active=4)
        print(result.num_active_parameters / result.num_parameters)
        model = moeify.load("my-moe")
    """
    options = SplitOptions.chosen(options, choices)
    out = check_out(Path(out), [model], overwrite=overwrite)
    dense = open_dense(model, track)
    check_is_no_model(out, dense.path)
    if options.budget is not None:
        options = under_budget(dense, options, track, announce)
    prepared = prepare(dense, options)
    prepared.warn_of_engines()
    gguf_bytes = _check_export(prepared, out, Path(gguf), export, overwrite=overwrite) if gguf is not None else 0
    # Before any work: a tokenizer that would cut text otherwise is a refusal.
    companions = settle_companions(dense.path, prepared.writer.config_text())
    blocks = calibration_text(prepared) if prepared.needs_text else None
    calibration = asdict(blocks.provenance) if blocks else {}
    with Workspace(out, _job(prepared, calibration), overwrite=overwrite) as workspace:
        if not workspace.is_complete:
            check_room(workspace.path, prepared.writer.num_bytes - workspace.num_bytes + gguf_bytes)
            deciding = Resumed(decide_layers(prepared, blocks, workspace), workspace.num_layers)
            layers = track(deciding, "splitting layers", prepared.dense.num_layers)
            # The refit columns stay on disk until their shard is written.
            kept = tuple(replace(layer, down_DF=None) for layer in layers)
            companions.write(workspace)
            _write(prepared, workspace, kept, calibration, track)
            workspace.check_sources(prepared.dense.check_unchanged)
        workspace.commit()
    sizes = count_parameters(prepared.writer)
    reason = prepared.target_reason
    target = prepared.target.model_type
    exported = None
    if gguf is not None:
        from moeify.export.gguf.export import export_gguf

        exported = export_gguf(out, gguf, export, overwrite=overwrite, track=track)
    return SplitResult(out, target, reason, prepared.layout, *sizes, load_plan(out), prepared.engines, exported)


def _check_export(prepared: Prepared, out: Path, gguf: Path, options: ExportOptions | None, *, overwrite: bool) -> int:
    """Find what can be wrong with a GGUF before the checkpoint is made; bytes that it takes on the same disk."""
    check_package()
    from moeify.export.gguf.export import check_split

    num_bytes = check_split(prepared.writer, gguf, options or ExportOptions(), out=out, overwrite=overwrite)
    return num_bytes if on_one_disk(out, gguf) else 0


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
    origin = origin_of(prepared.dense.path)
    card = model_card(plan, writer.config().architectures[0], (parameters, active), origin)
    workspace.write_record({"parameters": parameters, "active_parameters": active}, card)


def decide_layers(prepared: Prepared, blocks: TokenBlocks | None, workspace: Workspace) -> Iterator[LayerPlan]:
    """Yield a plan for each layer in order; layers finished earlier are replayed, not fitted again."""
    saved = prepared.saved_plan
    if blocks is None:
        neurons = prepared.dense.num_neurons
        yield from saved.layers if saved else (whole_plan(i, neurons) for i in range(prepared.dense.num_layers))
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
            workspace.check_sources(prepared.dense.check_unchanged)
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
        router_scale=prepared.router_scale,
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
