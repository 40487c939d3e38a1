"""What is settled before a calibration token is read: model, target, layout, numbers."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moeify import engines, partition, routers, targets
from moeify.calibration.share import ALONE, Share
from moeify.calibration.store import IN_MEMORY, Store
from moeify.calibration.stream import HiddenStream
from moeify.convert.droppable import check_droppable
from moeify.convert.layer import LayerFit
from moeify.convert.layouts import ROW_BYTES, choose_layout, expert_counts, verdicts
from moeify.convert.machine_plan import for_machine
from moeify.convert.texts import DEFAULT_CONTEXT, default_texts, tokens_of_image
from moeify.errors import InputError, UsageError, warn
from moeify.experts.mixing import Mixing
from moeify.export.writer import MoEWriter, check_fits, router_scale
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.models.device import find_device
from moeify.models.ffn import FFNWeights, pack
from moeify.models.inputs import Inputs, named
from moeify.models.shallow import kept_layers, without_layers
from moeify.options import SplitOptions
from moeify.plan import SplitPlan, load_plan
from moeify.targets import Target
from moeify.words import listing

# Fewer tokens leave the refit and the routers undetermined in every model moeify knows.
MIN_TOKENS = 1024
# Experts with added neurons of zeros are as wide as a multiple of this, so that they run in every type.
PADDED_TO = 8
# Into how many slices an FFN is cut of which all stay.
WHOLE_SLICES = 2


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before a calibration token is read."""

    dense: DenseModel
    options: SplitOptions
    layout: Layout
    target: Target
    target_reason: str
    saved_plan: SplitPlan | None
    dtype: torch.dtype

    @property
    def writer(self) -> MoEWriter:
        return MoEWriter(
            self.dense,
            self.target,
            self.layout,
            self.dtype,
            self.mixing,
            self.router_scale,
            self.options.remote_code,
            self.router_width,
        )

    @property
    def router_width(self) -> int:
        """Hidden units of the routers; 0 if they are linear."""
        return self.saved_plan.router_width if self.saved_plan else routers.width(self.options.router)

    @property
    def router_scale(self) -> float:
        return router_scale(self.target, self.layout, self.mixing)

    @property
    def mixing(self) -> Mixing:
        return Mixing.of(self.options)

    @property
    def engines(self) -> tuple[engines.Verdict, ...]:
        """What the engines that know the target say to the layout."""
        return verdicts(self.dense, self.target, self.layout)

    def warn_of_engines(self) -> None:
        """Warn of every engine that knows the target and refuses the layout or runs it slowly, or of all."""
        if not self.target.is_stock:
            unable = listing([engines.find(name).name for name in engines.names()])
            code = "needs trust_remote_code=True" if self.options.remote_code else "needs `import moeify`"
            more = "" if self.options.remote_code else "; --remote-code writes its code beside the weights"
            warn(f"moeify's own architecture is written: {unable} do not know it, transformers {code}{more}")
        for verdict in self.engines:
            if words := verdict.refusal or verdict.caution:
                does = "cannot run" if verdict.refusal else "runs"
                warn(f"{verdict.engine} {does} this layout{':' if verdict.refusal else ' slowly:'} {words}")

    @property
    def needs_text(self) -> bool:
        return not self.is_whole and (self.saved_plan is None or self.options.refit)

    @property
    def is_whole(self) -> bool:
        """No FFN is cut: layers go, and nothing else."""
        return self.layout.is_whole

    def fit(self, layout: Layout | None = None, store: Store = IN_MEMORY, share: Share = ALONE) -> LayerFit:
        """How to decide a layer; in another layout than the one that was settled, if one is given."""
        options = self.options
        return LayerFit(
            layout=layout or self.layout,
            partition=partition.find(options.partition),
            router=routers.find(options.router),
            mixing=self.mixing,
            refit=options.refit,
            dtype=self.dtype,
            seed=options.seed,
            store=store,
            share=share,
        )

    def ffn(self, layer: int) -> FFNWeights:
        """The dense FFN as it will be written: what is fitted must fit the checkpoint, not wider numbers."""
        rounded = self.dense.ffn(layer).map(lambda tensor: tensor.to(self.dtype))
        for name, tensor in pack(self.dense.family.ffn, self.dense.block(layer), rounded).items():
            check_fits(name, tensor)
        return rounded.map(lambda tensor: tensor.to(self.options.device, torch.float32))

    def stream(self, inputs: Tensor | Inputs, store: Store = IN_MEMORY) -> HiddenStream:
        """Hidden states in front of the first block.

        Args:
            inputs: of the model, by name; a tensor is ids_BC of text.
            store: holds them.
        """
        return HiddenStream(self.dense, named(inputs), self.options.device, store=store)


def prepare(dense: DenseModel, options: SplitOptions, *, writable: bool = True) -> Prepared:
    """Settle target, layout and dtype; reads headers only.

    Args:
        dense: the model.
        options: how to cut.
        writable: refuse what no checkpoint could hold.

    Raises:
        InputError: the model cannot be split, or not in this way.
        UsageError: the options contradict each other.
    """
    if options.machine is not None:
        options = for_machine(dense, options)
    saved = load_plan(Path(options.plan)) if options.plan else None
    if saved is not None:
        options = replace(
            options,
            experts=saved.layout.num_experts,
            shared=saved.layout.num_shared,
            active=None if saved.layout.active_by_layer else saved.layout.num_active,
            active_by_layer=saved.options.active_by_layer,
            min_active=saved.layout.min_active or None,
            max_active=saved.layout.max_active or None,
            dense_layers=saved.options.dense_layers,
            drop_layers=saved.options.drop_layers,
        )
    if not options.calibration:
        options = replace(options, calibration=default_texts(dense, options))
    _check_method(options, writable=writable)
    if options.drop_layers and options.static and options.active is None:
        # By depth alone.
        slices = options.experts or WHOLE_SLICES
        options = replace(options, experts=slices, active=slices)
    options = _by_layer(dense, options)
    kept = _kept(dense, options)
    if options.drop_layers:
        check_droppable(dense)
        dense = without_layers(dense, options.drop_layers)
    numbered = tuple(number for number, layer in enumerate(kept) if layer in options.dense_layers)
    by_layer = tuple(options.active_by_layer[layer] for layer in kept) if options.active_by_layer else ()
    dtype = dense.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    layout, target, reason = choose_layout(
        dense, replace(options, dense_layers=numbered, active_by_layer=by_layer), dtype, writable=writable
    )
    if writable and target.is_stock:
        _check_is_stock(options, target, saved)
    options = replace(options, device=str(find_device(options.device)))
    if len(dense.num_of_dtype) > 1:
        kinds = listing([f"{count:,} as {kind}" for kind, count in dense.num_of_dtype.items()])
        warn(f"tensors are stored in several types, {kinds}: all are written as {str(dtype).removeprefix('torch.')}")
    if not target.is_stock:
        dense = _padded(dense, layout, dtype, saved, writable=writable)
    if saved is not None:
        _check_plan(saved, dense)
        if not options.refit:
            # No text is read: the plan's text stays the one it was calibrated on.
            options = replace(options, calibration=saved.options.calibration, tokens=saved.options.tokens)
        saved = _again(saved, dtype, refit=options.refit)
    _check_width(layout, dense.num_neurons, dtype, writable=writable)
    if writable and layout.num_active == layout.num_experts and options.mixing != "soft" and not options.drop_layers:
        warn(
            f"{layout.num_active} of {layout.num_experts} experts are active for every token, which saves nothing: "
            f"with fewer, such as --active {max(1, layout.num_experts * 3 // 4)}, a token takes less time"
        )
    context = _context(dense, options)
    options = replace(
        options,
        experts=layout.num_experts,
        active=None if layout.active_by_layer else layout.num_active,
        dense_layers=tuple(kept[layer] for layer in layout.dense_layers),
        drop_layers=dense.dropped,
        context=context,
    )
    if not options.static:
        # What is only measured may have the dense model's own architecture.
        name = target.model_type if target.model_type in targets.names() else options.target
        options = replace(options, shared=layout.num_shared, target=name)
    return Prepared(dense, options, layout, target, reason, saved, dtype)


def _check_method(options: SplitOptions, *, writable: bool) -> None:
    """Raise UsageError for a method that there is not, or whose result no checkpoint could hold."""
    partition.find(options.partition)
    routers.find(options.router)
    if writable and not routers.is_written(options.router):
        known = ", ".join(name for name in routers.names() if routers.is_written(name))
        raise UsageError(
            f"no target has a {options.router} router",
            f"--router {known} can be written; `moeify compare` measures all of them",
        )
    if writable and options.static and (options.dense_layers or options.active_by_layer):
        raise UsageError(
            "the dense architecture has FFNs of one width, so --static prunes every layer alike",
            "leave --dense-layers and --active-by-layer out; `moeify compare` measures both",
        )


def _check_is_stock(options: SplitOptions, target: Target, saved: SplitPlan | None) -> None:
    """Raise UsageError for what moeify's own architecture alone has."""
    own = "--target moeify has it"
    if saved is not None and saved.router_width:
        raise UsageError(f"the plan has routers with a hidden layer, {target.model_type} has linear ones", own)
    if saved is None and not routers.is_linear(options.router):
        linear = ", ".join(name for name in routers.names() if routers.is_linear(name))
        raise UsageError(
            f"no stock target has a {options.router} router",
            f"--router {linear} can be written; {own}, and `moeify compare` measures all of them",
        )
    if options.remote_code:
        raise UsageError(
            f"{target.model_type} is an architecture of transformers itself, which needs no code",
            "leave --remote-code out; --target moeify writes moeify's own",
        )


def _context(dense: DenseModel, options: SplitOptions) -> int:
    """Tokens in a block of the calibration text, or of an image.

    Raises:
        InputError: the model does not take so many, or there are too few tokens in all.
    """
    if dense.family.modality == "image":
        if options.context is not None and options.plan is None:
            raise UsageError("--context is about text, this model takes images", "leave it out")
        return tokens_of_image(dense)
    if dense.family.modality == "audio":
        if options.context is not None and options.plan is None:
            raise UsageError("--context is about text, this model hears", "leave it out")
        return int(dense.config.max_source_positions)
    limit = dense.family.context_of(dense.text_config)
    context = options.context or min(DEFAULT_CONTEXT, limit)
    if not 16 <= context <= limit:
        raise InputError(
            f"context {context} does not fit {dense.name}, which takes 16 to {limit} tokens",
            f"--context {min(512, limit)}",
        )
    if options.tokens < MIN_TOKENS:
        raise InputError(f"{options.tokens:,} calibration tokens are too few", f"--tokens takes {MIN_TOKENS:,} or more")
    return context


def _by_layer(dense: DenseModel, options: SplitOptions) -> SplitOptions:
    """The options with the dense layers that the numbers of single layers name, none of one that goes.

    Raises:
        UsageError: the numbers are not those of this model's layers.
    """
    numbers, option = options.active_by_layer, "--active-by-layer"
    if not numbers:
        return options
    if options.experts is None:
        raise UsageError(f"{option} needs to know of how many experts", "name --experts")
    if len(numbers) != dense.num_layers:
        raise UsageError(
            f"{option} has {len(numbers)} numbers, {dense.name} has {dense.num_layers} layers", "write one for each"
        )
    numbers = tuple(0 if layer in options.drop_layers else number for layer, number in enumerate(numbers))
    if gone := [layer for layer, number in enumerate(numbers) if not number and layer not in options.drop_layers]:
        raise UsageError(f"no expert of layer {gone[0]} is to be active", "--drop-layers has a whole layer go")
    whole = tuple(layer for layer, number in enumerate(numbers) if number == options.experts)
    if options.dense_layers and set(options.dense_layers) != set(whole):
        raise UsageError(
            f"{option} has all experts in layers {list(whole)}, --dense-layers names {list(options.dense_layers)}",
            "leave --dense-layers out",
        )
    return replace(options, active_by_layer=numbers, dense_layers=whole)


def _kept(dense: DenseModel, options: SplitOptions) -> list[int]:
    """Numbers of the layers that are not dropped.

    Raises:
        InputError: there is no such layer to leave dense, or nothing is cut.
    """
    missing = [layer for layer in options.dense_layers if not 0 <= layer < dense.num_layers]
    if missing:
        hint = f"--dense-layers takes 0 to {dense.num_layers - 1}"
        raise InputError(f"there is no layer {missing[0]} to leave dense", hint)
    if both := sorted(set(options.dense_layers) & set(options.drop_layers)):
        raise UsageError(f"layer {both[0]} is to stay dense and to go", "name it in one of both options")
    kept = kept_layers(dense.num_layers, options.drop_layers)
    if kept and set(kept) <= set(options.dense_layers):
        raise InputError("every layer is to stay dense, nothing is cut", "leave a layer out of --dense-layers")
    return kept


def _padded(
    dense: DenseModel, layout: Layout, dtype: torch.dtype, saved: SplitPlan | None, *, writable: bool
) -> DenseModel:
    """The model with neurons of zeros behind those of every FFN where the experts would not be equal, or not run."""
    multiple = ROW_BYTES // dtype.itemsize if writable else 1
    if saved is not None:
        padding = max(0, saved.layers[0].labels_F.numel() - dense.num_neurons)
    elif dense.num_neurons % (layout.num_experts * multiple):
        padding = -dense.num_neurons % (layout.num_experts * PADDED_TO)
    else:
        padding = 0
    if padding:
        whole = dense.num_neurons + padding
        warn(
            f"{dense.num_neurons:,} neurons do not divide into {layout.num_experts} experts that run: {padding:,} of "
            f"zeros are added, {padding / whole:.1%} of the written FFNs"
        )
    return replace(dense, padding=padding) if padding else dense


def _check_width(layout: Layout, num_neurons: int, dtype: torch.dtype, *, writable: bool) -> None:
    works = ", ".join(map(str, expert_counts(num_neurons, dtype)))
    hint = f"--experts {works} work for this model" if works else "no number of experts works for this model"
    if not layout.is_static:
        hint += "; --target moeify takes every number"
    if num_neurons % layout.num_experts:
        raise InputError(f"{num_neurons} neurons do not divide into {layout.num_experts} experts", hint)
    width, multiple = layout.expert_width(num_neurons), ROW_BYTES // dtype.itemsize
    if writable and width % multiple and not layout.is_static:
        raise InputError(
            f"experts of {width} neurons cannot run in {str(dtype).removeprefix('torch.')}: the grouped matrix product "
            f"of stock transformers takes multiples of {multiple}",
            hint,
        )


def _again(plan: SplitPlan, dtype: torch.dtype, *, refit: bool) -> SplitPlan:
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


def _check_plan(plan: SplitPlan, dense: DenseModel) -> None:
    """Raise InputError unless the plan is of a model of this shape."""
    pairs = [
        ("layers", len(plan.layers), dense.num_layers),
        ("neurons a layer", plan.layers[0].labels_F.numel(), dense.num_neurons),
    ]
    routed = next((layer for layer in plan.layers if layer.router_RD is not None), None)
    if routed is not None and routed.router_RD is not None:
        size = routed.router_RD.shape[1] if routed.units_HC is None else routed.units_HC.shape[1] - 1
        pairs.append(("hidden size", size, dense.hidden_size))
    for what, found, expected in pairs:
        if found != expected:
            raise InputError(
                f"the plan is of another model: {what} {found:,}, {dense.name} has {expected:,}",
                f"the plan was made from {plan.source}",
            )
