"""The pipeline: a dense checkpoint in, a mixture-of-experts checkpoint out. This file alone knows the order.

Legend: T tokens, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from moeify import partition
from moeify.calibration.gradients import output_gradients
from moeify.calibration.share import ALONE, Share
from moeify.calibration.store import IN_MEMORY, Store
from moeify.convert.estimate import count_parameters, place_of_text, text_bytes
from moeify.convert.layer import converted, fit_layer, fixed_plan
from moeify.convert.machine_plan import for_machine
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.search import under_budget
from moeify.convert.text_size import warn_of_few_tokens
from moeify.convert.texts import Blocks, calibration_inputs
from moeify.convert.walk import CalibrationWalk
from moeify.engines import Verdict
from moeify.experts.slices import SplitFFN, slice_experts
from moeify.export.companions import settle_companions
from moeify.export.gguf import check_package
from moeify.export.gguf.result import ExportResult
from moeify.export.model_card import model_card
from moeify.export.origin import origin_of
from moeify.export.record import check_is_no_model, check_out
from moeify.export.workspace import Workspace
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.models.heads import auto_name
from moeify.options import Announce, ExportOptions, SplitOptions, Track
from moeify.plan import LayerPlan, SplitPlan, load_plan
from moeify.progress import Resumed, said, shown
from moeify.readable import Readable
from moeify.resources import check_room, on_one_disk
from moeify.version import __version__
from moeify.words import size


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
    quick: bool = False,
    share: Share = ALONE,
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
        announce: told the expected time of the search for layers, if the options have a budget, and where hidden states
            go.
        quick: search for layers with the likeliest candidates, if the options have a budget.
        share: this process's among those that share the calibration tokens, `moeify.calibration.share.joined()` under
            torchrun; each makes the same call, the first one decides and writes.
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
    dense = _opened(model, track, share)
    check_is_no_model(out, dense.path)
    if options.budget is not None:
        options = share.first(partial(under_budget, dense, options, track, announce, quick=quick))
    if options.machine is not None:
        # It measures.
        options = share.first(partial(for_machine, dense, options))
    prepared = prepare(dense, options)
    if share.is_first:
        prepared.warn_of_engines()
    to_gguf = None if gguf is None else Path(gguf)
    gguf_bytes = share.first(lambda: _check_export(prepared, out, to_gguf, export, overwrite=overwrite))
    # Before any work: a tokenizer that would cut text otherwise is a refusal.
    companions = settle_companions(dense.path, prepared.writer.config_text())
    blocks = share.first(lambda: calibration_inputs(prepared)) if prepared.needs_text else None
    if share.is_first:
        with Workspace(out, _job(prepared, _text_of(prepared, blocks)), overwrite=overwrite) as workspace:
            if not share.first(lambda: workspace.is_complete):
                check_room(workspace.path, prepared.writer.num_bytes - workspace.num_bytes + gguf_bytes)
                companions.write(workspace)
                _build(prepared, blocks, workspace, share=share, track=track, announce=announce)
            workspace.commit()
    elif not share.first(_none):
        for _ in decide_layers(prepared, blocks, None, share.first(_none), share):
            pass
    # The others wait until all is written.
    share.first(lambda: None)
    exported = None
    if gguf is not None and share.is_first:
        from moeify.export.gguf.export import export_gguf

        exported = export_gguf(out, gguf, export, overwrite=overwrite, track=track)
    return SplitResult(
        out,
        prepared.target.model_type,
        prepared.target_reason,
        prepared.layout,
        *count_parameters(prepared.writer),
        load_plan(out),
        prepared.engines,
        exported,
    )


def _opened(model: str | Path | DenseModel, track: Track[Any], share: Share) -> DenseModel:
    """The model; what has to be fetched, trained or converted for it is so once."""
    opened: list[DenseModel] = []
    share.first(lambda: opened.append(open_dense(model, track)))
    return opened[0] if opened else open_dense(model, track)


def _text_of(prepared: Prepared, blocks: Blocks | None) -> dict[str, Any]:
    """Where the calibration tokens are from; of a plan that is taken over, those that it was calibrated on."""
    if blocks is not None:
        return asdict(blocks.provenance)
    return dict(prepared.saved_plan.calibration) if prepared.saved_plan else {}


def _build(
    prepared: Prepared,
    blocks: Blocks | None,
    workspace: Workspace,
    *,
    share: Share,
    track: Track[Any],
    announce: Announce,
) -> None:
    """Decide all layers and write the checkpoint."""
    calibration = _text_of(prepared, blocks)
    store = share.first(lambda: _store(prepared, workspace, announce))
    if store.folder is not None:
        calibration["hidden_states"] = "bfloat16"
    deciding = Resumed(decide_layers(prepared, blocks, workspace, store, share), workspace.num_layers)
    layers = track(deciding, "splitting layers", prepared.dense.num_layers)
    # The refit columns stay on disk until their shard is written.
    kept = tuple(replace(layer, down_DF=None) for layer in layers)
    warn_of_few_tokens(kept, calibration.get("num_tokens", 0))
    _write(prepared, workspace, kept, calibration, track)
    workspace.check_sources(prepared.dense.check_unchanged)


def _none(*_: int) -> Any:
    """Stands where the first process decides."""


def _store(prepared: Prepared, workspace: Workspace, announce: Announce) -> Store:
    """Where hidden states are held; a run that goes on holds them where it began, for the same bits."""
    num_bytes = text_bytes(prepared)
    where = workspace.decided("hidden-states", lambda: place_of_text(prepared, num_bytes))
    if where == "memory":
        return IN_MEMORY
    num_bytes //= 2
    check_room(workspace.path, num_bytes)
    announce(f"the hidden states of {prepared.options.tokens:,} tokens lie on the disk in bfloat16: {size(num_bytes)}")
    return Store(workspace.path / "work")


def _check_export(
    prepared: Prepared, out: Path, gguf: Path | None, options: ExportOptions | None, *, overwrite: bool
) -> int:
    """Find what can be wrong with a GGUF before the checkpoint is made; bytes that it takes on the same disk."""
    if gguf is None:
        return 0
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
    config = writer.config()
    card = model_card(plan, config.architectures[0], (parameters, active), origin, auto_name(config))
    workspace.write_record({"parameters": parameters, "active_parameters": active}, card)


def decide_layers(
    prepared: Prepared,
    blocks: Blocks | None,
    workspace: Workspace | None,
    store: Store = IN_MEMORY,
    share: Share = ALONE,
) -> Iterator[LayerPlan]:
    """Yield a plan for each layer in order; layers finished earlier are replayed, not fitted again.

    Args:
        prepared: the model and its options.
        blocks: the calibration text of all processes; None needs a saved plan.
        workspace: keeps finished layers; only the first process has one.
        store: holds what is as long as the text.
        share: whose tokens are this process's own.
    """
    saved = prepared.saved_plan
    if blocks is None:
        neurons, layout = prepared.dense.num_neurons, prepared.layout
        layers = range(prepared.dense.num_layers)
        yield from saved.layers if saved else (fixed_plan(i, neurons, layout.of_layer(i)) for i in layers)
        return
    fit, gradients, inputs = prepared.fit(store=store, share=share), [], blocks.inputs
    if saved is None and partition.needs_gradients(prepared.options.partition):
        gradients = share.first(lambda: output_gradients(prepared.dense, inputs, prepared.options.device))
    own = share.parts(inputs, blocks.provenance.context)
    walk = CalibrationWalk(prepared, own, gradients=gradients, store=store)
    for layer in range(prepared.dense.num_layers):
        stage = walk.enter(layer)
        plan: LayerPlan | None = share.first(partial(_none if workspace is None else workspace.load_layer, layer))
        if plan is None:
            again = saved.layers[layer] if saved else None
            fitted, outputs_TD = fit_layer(
                stage.ffn, stage.inputs_TD, fit, again, gradient_GD=stage.gradient_GD, goal_TD=stage.goal_TD
            )
            plan = fitted.plan
            if workspace is not None:
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
