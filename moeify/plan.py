"""What was decided about a split: how each FFN is cut, which neuron goes where, which router chooses.

Legend: F neurons of the dense FFN, f neurons of one expert, D hidden size, R routed experts, T tokens, H hidden units
of a router, C = D + 1.

A plan is small (one label per neuron and one router row per routed expert). It does not hold the refit columns of
down_proj: those follow from the plan and the calibration text in closed form, so `moeify split --plan` recomputes them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeify.errors import InputError, UsageError
from moeify.layout import Layout
from moeify.options import SplitOptions
from moeify.readable import Readable

SHARED = -1
PLAN_FILE = "split_plan.safetensors"
PLAN_SCHEMA = "moeify.plan/2"
# What the rows of hard routers were multiplied with before plans said it.
OLD_ROUTER_SCALE = 2.0**-10
# What to do about a plan whose numbers do not fit each other.
DAMAGED = "the file is damaged: split the model again"
# What a plan's header says beside layout, options and diagnostics.
HEADER_TYPES = {"source": str, "family": str, "target": str, "calibration": dict, "version": str}


@dataclass(frozen=True, repr=False)
class LayerPlan(Readable):
    """Decisions for one layer.

    Args:
        layer: index in the dense model without the layers that are dropped.
        labels_F: int16, SHARED or the routed expert 0..R-1 that owns the neuron; one label each, so coverage holds by
            construction.
        router_RD: rows that score the routed experts, in the checkpoint's dtype and scaled so that no calibration
            token scores beyond +-ROUTER_LIMIT; router_RH on units; None in a static plan.
        down_DF: refit down_proj in dense column order, in the checkpoint's dtype; None keeps the dense one.
        diagnostics: what the fit measured, dimensionless.
        units_HC: weights of the router's hidden units and, behind them, their biases; None of a linear router.
        threshold_R: score above which each expert is chosen; None where every token gets as many.
    """

    layer: int
    labels_F: Tensor
    router_RD: Tensor | None
    down_DF: Tensor | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    units_HC: Tensor | None = None
    threshold_R: Tensor | None = None

    def check(self, layout: Layout) -> None:
        """Raise InputError unless every expert has exactly its share of neurons."""
        if self.labels_F.ndim != 1 or self.labels_F.dtype != torch.int16 or int(self.labels_F.min()) < SHARED:
            raise InputError(
                f"layer {self.layer} of the plan has no int16 labels of {SHARED} and up, one a neuron", DAMAGED
            )
        layout = layout.of_layer(self.layer)
        width = layout.expert_width(self.labels_F.numel())
        if layout.is_whole:
            if (self.labels_F != SHARED).any():
                raise InputError(
                    f"layer {self.layer} of the plan is dense, but not all of its labels are {SHARED}", DAMAGED
                )
            return
        counts = torch.bincount(self.labels_F.long() + 1, minlength=layout.num_routed + 1)
        expected = torch.tensor([layout.num_shared * width] + [width] * layout.num_routed)
        if counts.shape != expected.shape or not torch.equal(counts, expected):
            raise InputError(
                f"layer {self.layer} of the plan has neuron counts {counts.tolist()} (shared first), "
                f"expected {expected.tolist()}",
                "every neuron needs one label: -1 for shared or the number of its routed expert",
            )

    def check_router(self, layout: Layout) -> None:
        """Raise InputError unless there is a finite router row for each routed expert, or none in a static plan."""
        layout = layout.of_layer(self.layer)
        rows = 0 if self.router_RD is None else self.router_RD.shape[0]
        expected = 0 if layout.is_static else layout.num_routed
        if rows != expected:
            raise InputError(f"layer {self.layer} of the plan has {rows} router rows, expected {expected}", DAMAGED)
        if expected and (self.threshold_R is not None) != layout.is_adaptive:
            raise InputError(f"layer {self.layer} of the plan and its layout differ in how experts are chosen", DAMAGED)
        parts = (self.router_RD, self.units_HC, self.threshold_R)
        if any(part is not None and not part.isfinite().all() for part in parts):
            raise InputError(f"layer {self.layer} of the plan has a router with NaN or infinite values", DAMAGED)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a safetensors file holds of it, by name; diagnostics are left to the caller."""
        router = {"router": self.router_RD, "router_units": self.units_HC, "router_threshold": self.threshold_R}
        parts = {"labels": self.labels_F, "down": self.down_DF, **router}
        return {f"{prefix}{name}": part.contiguous() for name, part in parts.items() if part is not None}

    @classmethod
    def read(cls, reader: Any, layer: int, prefix: str = "") -> "LayerPlan":
        """The inverse of `tensors`, from an open safetensors file.

        Raises:
            SafetensorError: the file has no such labels.
        """
        names = set(reader.keys())
        router_RD, down_DF, units_HC, threshold_R = (
            reader.get_tensor(prefix + name) if prefix + name in names else None
            for name in ("router", "down", "router_units", "router_threshold")
        )
        labels_F = reader.get_tensor(f"{prefix}labels")
        return cls(layer, labels_F, router_RD, down_DF, units_HC=units_HC, threshold_R=threshold_R)

    def neurons(self, expert: int) -> Tensor:
        """Ascending dense indices of the neurons of one expert, or of the shared part."""
        return (self.labels_F == expert).nonzero().squeeze(1)


@dataclass(frozen=True, repr=False)
class SplitPlan(Readable):
    """Everything that was decided for a model, with where it came from.

    `router_scale` is what router rows are multiplied with in the checkpoint; `trained` lists the stages of fine-tuning
    that came after the split.
    """

    layout: Layout
    layers: tuple[LayerPlan, ...]
    source: str
    family: str
    target: str
    options: SplitOptions
    calibration: Mapping[str, Any]
    version: str
    router_scale: float
    trained: tuple[str, ...] = ()

    @property
    def is_routed(self) -> bool:
        """Whether a layer chooses experts."""
        return any(layer.router_RD is not None for layer in self.layers)

    @property
    def router_width(self) -> int:
        """Hidden units of its routers; 0 if they are linear."""
        return next((len(layer.units_HC) for layer in self.layers if layer.units_HC is not None), 0)

    def save(self, path: str | Path) -> None:
        """Write labels, routers and provenance; refit columns are left out (see the module's first lines)."""
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            tensors |= replace(layer, down_DF=None).tensors(f"layers.{layer.layer}.")
        header = {
            "schema": PLAN_SCHEMA,
            "layout": asdict(self.layout),
            "source": self.source,
            "family": self.family,
            "target": self.target,
            "options": asdict(self.options),
            "calibration": dict(self.calibration),
            "version": self.version,
            "router_scale": self.router_scale,
            "trained": list(self.trained),
            "diagnostics": [dict(layer.diagnostics) for layer in self.layers],
        }
        save_file(tensors, path, metadata={"moeify": json.dumps(header, sort_keys=True)})


def load_plan(path: str | Path) -> SplitPlan:
    """Read a plan; `path` is the file itself or the folder of a converted checkpoint.

    Raises:
        InputError: no such file, not a plan, or a plan whose labels do not match its layout.

    Example:
        plan = moeify.load_plan("my-moe")
        print(plan.layout, plan.layers[0].diagnostics)
    """
    path = Path(path)
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"no split plan at {file}", f"every converted checkpoint holds one as {PLAN_FILE}")
    try:
        with safe_open(file, framework="pt") as reader:
            header = json.loads((reader.metadata() or {}).get("moeify", "{}"))
            if header.get("schema") != PLAN_SCHEMA:
                raise InputError(
                    f"{file} has schema {header.get('schema')!r}, expected {PLAN_SCHEMA!r}",
                    f"every converted checkpoint holds a plan as {PLAN_FILE}",
                )
            layers = tuple(
                replace(LayerPlan.read(reader, i, f"layers.{i}."), down_DF=None, diagnostics=diagnostics)
                for i, diagnostics in enumerate(header["diagnostics"])
            )
        for key, kind in HEADER_TYPES.items():
            if not isinstance(header[key], kind):
                raise TypeError(f"{key} is {header[key]!r:.60}, expected {kind.__name__}")
        options = SplitOptions.of(header["options"])
        plan = SplitPlan(
            layout=_layout(header["layout"]),
            layers=layers,
            trained=tuple(header.get("trained", ())),
            options=options,
            router_scale=_router_scale(header, options),
            **{key: header[key] for key in HEADER_TYPES},
        )
    except (SafetensorError, KeyError, TypeError, AttributeError, UsageError, json.JSONDecodeError) as error:
        raise InputError(
            f"{file} is not a complete split plan: {error}", f"every converted checkpoint holds one as {PLAN_FILE}"
        ) from error
    if (numbers := plan.layout.active_by_layer) and len(numbers) != len(plan.layers):
        raise InputError(f"the plan has {len(plan.layers)} layers and active experts of {len(numbers)}", DAMAGED)
    if plan.layout.is_empty:
        raise InputError("the plan has no active experts", DAMAGED)
    if (last := max(plan.layout.static_layers, default=0)) >= len(plan.layers):
        raise InputError(f"the plan has {len(plan.layers)} layers, one of them static is {last}", DAMAGED)
    for layer in plan.layers:
        layer.check(plan.layout)
        layer.check_router(plan.layout)
    return plan


def _layout(values: dict[str, Any]) -> Layout:
    """From JSON, which has lists for tuples."""
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Layout(**plain)


def _router_scale(header: Mapping[str, Any], options: SplitOptions) -> float:
    """What the checkpoint's router rows were multiplied with; the first plans do not say it."""
    old = OLD_ROUTER_SCALE if options.mixing == "hard" else 1 / options.temperature
    scale = header.get("router_scale", old)
    if type(scale) is not float or not 0 < scale < math.inf:
        raise TypeError(f"router_scale is {scale!r:.60}, expected a number above zero")
    return scale
