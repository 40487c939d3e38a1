"""The pipeline: a dense checkpoint in, a mixture-of-experts checkpoint out. This file alone knows the order.

Legend: T tokens, D hidden size.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from moeify import partition, routers, targets
from moeify.activations import FFNWeights
from moeify.calibration import HiddenStream
from moeify.card import model_card
from moeify.checkpoint import DenseCheckpoint, open_dense
from moeify.errors import InputError, UsageError
from moeify.estimate import Estimate, count_parameters, estimate
from moeify.layer import LayerFit, fit_layer, replay_layer
from moeify.options import SplitOptions, Track, untracked
from moeify.plan import LayerPlan, Layout, SplitPlan, load_plan, resolve_layout
from moeify.targets import Target
from moeify.text import TokenBlocks, calibration_blocks, sample_from_model
from moeify.version import __version__
from moeify.workspace import RECORD_FILE, Workspace, check_replaceable
from moeify.writer import MoEWriter

DEFAULT_CONTEXT = 512
# Fewer tokens leave the refit and the routers undetermined in every model moeify knows.
MIN_TOKENS = 1024


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


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before a calibration token is read."""

    dense: DenseCheckpoint
    options: SplitOptions
    layout: Layout
    target: Target
    target_reason: str
    saved_plan: SplitPlan | None
    dtype: torch.dtype

    @property
    def writer(self) -> MoEWriter:
        return MoEWriter(self.dense, self.target, self.layout, self.dtype)

    @property
    def needs_text(self) -> bool:
        return self.saved_plan is None or self.options.refit


def prepare(model: str, options: SplitOptions, track: Track[Any] = untracked) -> Prepared:
    """Open the model and settle target, layout and dtype; reads headers only.

    Raises:
        InputError: the model cannot be split, or not in this way.
        UsageError: the options contradict each other.
    """
    dense = open_dense(model, track)
    saved = load_plan(Path(options.plan)) if options.plan else None
    if saved is not None:
        options = replace(
            options, experts=saved.layout.num_experts, shared=saved.layout.num_shared, active=saved.layout.num_active
        )
    partition.find(options.partition)
    routers.find(options.router)
    layout, target, reason = _choose_target(dense, options)
    layout.expert_width(dense.config.intermediate_size)
    if saved is not None and len(saved.layers) != dense.num_layers:
        raise InputError(f"the plan has {len(saved.layers)} layers, {model} has {dense.num_layers}")
    if saved is not None and saved.layers[0].labels_F.numel() != dense.config.intermediate_size:
        raise InputError(
            f"the plan labels {saved.layers[0].labels_F.numel()} neurons a layer, "
            f"{model} has {dense.config.intermediate_size}"
        )
    dtype = dense.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    limit = int(dense.config.max_position_embeddings)
    context = options.context or min(DEFAULT_CONTEXT, limit)
    if not 16 <= context <= limit:
        raise InputError(f"context {context} does not fit {model}, which takes 16 to {limit} tokens")
    if options.tokens < MIN_TOKENS:
        raise InputError(f"{options.tokens:,} calibration tokens are too few", f"--tokens takes {MIN_TOKENS:,} or more")
    options = replace(
        options, context=context, shared=None if options.static else layout.num_shared, active=layout.num_active
    )
    return Prepared(dense, options, layout, target, reason, saved, dtype)


@dataclass(frozen=True)
class Preview:
    """What a split would do and cost; what `--dry-run` shows."""

    model: str
    family: str
    num_layers: int
    target: str
    target_reason: str
    layout: Layout
    expert_width: int
    num_parameters: int
    num_active_parameters: int
    dtype: str
    options: SplitOptions
    estimate: Estimate


def preview(model: str, options: SplitOptions | None = None, *, track: Track[Any] = untracked) -> Preview:
    """Settle everything that a split settles before it reads text, and estimate the rest. Writes nothing.

    Raises:
        InputError: the model cannot be split in this way.
    """
    prepared = prepare(model, options or SplitOptions(), track)
    return Preview(
        model,
        prepared.dense.family.model_type,
        prepared.dense.num_layers,
        prepared.target.model_type,
        prepared.target_reason,
        prepared.layout,
        prepared.layout.expert_width(prepared.dense.config.intermediate_size),
        *count_parameters(prepared.writer),
        str(prepared.dtype).removeprefix("torch."),
        prepared.options,
        estimate(prepared),
    )


def _choose_target(dense: DenseCheckpoint, options: SplitOptions) -> tuple[Layout, Target, str]:
    def resolve(holds_shared: bool) -> Layout:
        return resolve_layout(options.experts, options.shared, options.active, holds_shared=holds_shared)

    if options.static:
        active = resolve(True).num_active
        layout = Layout(options.experts, active, active)
        return layout, targets.static_target(dense.family), "static pruning keeps the dense architecture"
    if options.target == "auto":
        target, layout, reason = targets.choose(dense.traits, dense.config, resolve)
        return layout, target, reason
    target = targets.find(options.target)
    layout = resolve(target.holds_shared)
    reason = targets.refusal(target, dense.traits, dense.config, layout)
    if reason:
        raise InputError(
            f"{options.target} cannot hold this model: {reason}", "`moeify inspect` lists targets that can"
        )
    return layout, target, "asked for"


def split(
    model: str,
    out: str | Path,
    options: SplitOptions | None = None,
    *,
    overwrite: bool = False,
    track: Track[Any] = untracked,
) -> SplitResult:
    """Convert a dense checkpoint into a native mixture-of-experts checkpoint.

    Args:
        model: a folder, a .gguf file, a hub id or `builtin`.
        out: where the checkpoint goes; appears only when it is complete.
        options: how to cut.
        overwrite: replace an earlier result at `out` once the new one is complete.
        track: wraps long loops to show progress.

    Raises:
        InputError: the model, the text or the place is not usable; `out` is untouched.
    """
    out = Path(out)
    prepared = prepare(model, options or SplitOptions(), track)
    if out.resolve() == prepared.dense.path.resolve():
        raise UsageError(f"{out} is the dense model itself", "choose another -o")
    check_replaceable(out, overwrite=overwrite)
    blocks = calibration_text(prepared) if prepared.needs_text else None
    calibration = asdict(blocks.provenance) if blocks else {}
    job = _job(prepared, calibration)
    with Workspace(out, job, overwrite=overwrite) as workspace:
        layers = decide_layers(prepared, blocks, workspace)
        # The refit columns stay on disk until their shard is written.
        light = tuple(
            replace(layer, down_DF=None) for layer in track(layers, "splitting layers", prepared.dense.num_layers)
        )
        plan = _plan(prepared, light, calibration)
        writer = prepared.writer
        writer.write(workspace, lambda layer: workspace.load_layer(layer) or light[layer], track)
        workspace.write_plan(plan)
        sizes = count_parameters(writer)
        result = SplitResult(out, prepared.target.model_type, prepared.target_reason, prepared.layout, *sizes, plan)
        record = {"schema": "moeify.record/1", "job": job, "parameters": sizes[0], "active_parameters": sizes[1]}
        workspace.write_text(RECORD_FILE, json.dumps(record, indent=1, sort_keys=True) + "\n")
        workspace.write_text("README.md", model_card(plan, writer.config().architectures[0], sizes))
        workspace.commit()
    return result


def calibration_text(prepared: Prepared) -> TokenBlocks:
    """The calibration tokens, checked against the model's vocabulary."""
    options, dense = prepared.options, prepared.dense

    def sample(num_tokens: int, context: int, seed: int) -> Tensor:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.float32)
        return sample_from_model(model.to(options.device), num_tokens=num_tokens, context=context, seed=seed)

    assert options.context is not None
    blocks = calibration_blocks(
        options.calibration,
        dense.tokenizer(),
        num_tokens=options.tokens,
        context=options.context,
        seed=options.seed,
        sample=sample,
    )
    largest = int(blocks.ids_BC.max())
    if largest >= dense.config.vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, the model has {dense.config.vocab_size} tokens",
            "tokenizer and weights are not of the same model",
        )
    return blocks


def decide_layers(prepared: Prepared, blocks: TokenBlocks | None, workspace: Workspace) -> Iterator[LayerPlan]:
    """Yield a plan for each layer in order; layers finished earlier are replayed, not fitted again."""
    saved = prepared.saved_plan
    if blocks is None:
        assert saved is not None
        yield from saved.layers
        return
    options, dense = prepared.options, prepared.dense
    fit = LayerFit(
        layout=prepared.layout,
        partition=partition.find(options.partition),
        router=routers.find(options.router),
        refit=options.refit,
        dtype=prepared.dtype,
        seed=options.seed,
    )
    stream = HiddenStream(dense, blocks.ids_BC, options.device)
    for layer in range(dense.num_layers):
        inputs_TD = stream.attend(layer)
        gate_FD, up_FD, down_DF = (weight.to(options.device, torch.float32) for weight in dense.ffn(layer))
        ffn = FFNWeights(layer, gate_FD, up_FD, down_DF, dense.config.hidden_act)
        plan = workspace.load_layer(layer)
        if plan is None:
            plan, outputs_TD = fit_layer(ffn, inputs_TD, fit, saved.layers[layer] if saved else None)
            workspace.save_layer(plan)
        else:
            outputs_TD = replay_layer(ffn, inputs_TD, plan, prepared.layout)
        stream.advance(outputs_TD)
        yield plan


def _plan(prepared: Prepared, layers: tuple[LayerPlan, ...], calibration: dict[str, Any]) -> SplitPlan:
    return SplitPlan(
        layout=prepared.layout,
        layers=layers,
        source=prepared.dense.name,
        family=prepared.dense.family.model_type,
        target=prepared.target.model_type,
        options=asdict(prepared.options),
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
