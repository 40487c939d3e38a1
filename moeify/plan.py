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
from moeify.options import SplitOptions
from moeify.readable import Readable

SHARED = -1
PLAN_FILE = "split_plan.safetensors"
PLAN_SCHEMA = "moeify.plan/2"
# What the rows of hard routers were multiplied with before plans said it.
OLD_ROUTER_SCALE = 2.0**-10
# What a plan's header says beside layout, options and diagnostics.
# What to do about a plan whose numbers do not fit each other.
DAMAGED = "the file is damaged: split the model again"
HEADER_TYPES = {"source": str, "family": str, "target": str, "calibration": dict, "version": str}


@dataclass(frozen=True)
class Layout:
    """How every FFN is cut: E equal slices, S of them always on, A of them run for a token, shared ones included.

    FFNs of `dense_layers` are not cut. With `max_active` a token runs as many slices as have a score above a threshold,
    at least `min_active` and at most `max_active` of them; `num_active` is the mean then.

    With `active_by_layer` every layer has a number of its own, and `num_active` is the mean of those that are cut,
    rounded. One that stays dense has all, one that goes, in the choice of a search, has none.
    """

    num_experts: int
    num_shared: int
    num_active: int
    dense_layers: tuple[int, ...] = ()
    min_active: int = 0
    max_active: int = 0
    active_by_layer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        further = (self.min_active, self.max_active, *self.active_by_layer)
        numbers = (self.num_experts, self.num_shared, self.num_active, *self.dense_layers, *further)
        if wrong := [number for number in numbers if type(number) is not int]:
            raise UsageError(
                f"a layout has the number {wrong[0]!r}, expected whole numbers",
                "a layout has numbers of experts, shared and active ones, and layers",
            )
        if self.num_experts < 2:
            raise UsageError(f"{self.num_experts} experts are not a mixture", "--experts takes 2 or more")
        if not 1 <= self.num_active <= self.num_experts:
            raise UsageError(
                f"{self.num_active} active of {self.num_experts} experts is impossible",
                f"--active takes 1 to {self.num_experts}",
            )
        if not 0 <= self.num_shared <= self.num_active:
            raise UsageError(
                f"{self.num_shared} shared of {self.num_active} active experts is impossible",
                f"--shared takes 0 to {self.num_active}; shared experts count as active",
            )

        if self.active_by_layer:
            self._check_layers()
        least, most = min(self.cut_counts), max(self.cut_counts)
        if self.is_adaptive and not (
            self.num_shared <= self.min_active <= least <= most <= self.max_active <= self.num_experts
        ):
            active = f"{least}" if least == most else f"{least} to {most}"
            raise UsageError(
                f"{self.min_active} to {self.max_active} active experts are impossible with {self.num_shared} shared "
                f"and {active} active of {self.num_experts}",
                "shared <= --min-active <= --active <= --max-active <= --experts",
            )

    def _check_layers(self) -> None:
        """Raise UsageError unless the numbers of single layers fit each other and the others."""
        numbers, option = self.active_by_layer, "--active-by-layer"
        if wrong := [number for number in numbers if not 0 <= number <= self.num_experts]:
            raise UsageError(
                f"{wrong[0]} active of {self.num_experts} experts is impossible",
                f"{option} takes {self.num_shared + 1} to {self.num_experts}",
            )
        cut = [number for number in numbers if 0 < number < self.num_experts]
        if not cut:
            raise UsageError("no layer has fewer active experts than there are", f"{option} cuts one or more")
        if (least := min(cut)) <= self.num_shared and not self.is_static:
            raise UsageError(
                f"a layer of {least} active experts has none to choose beside {self.num_shared} shared ones",
                f"{option} takes {self.num_shared + 1} to {self.num_experts}, or lower --shared",
            )
        whole = tuple(layer for layer, number in enumerate(numbers) if number == self.num_experts)
        if whole != self.dense_layers or self.num_active != mean_active(numbers, self.num_experts):
            raise UsageError(
                f"{option} has all experts in {list(whole)}, dense layers are {list(self.dense_layers)}, the mean of "
                f"the others is {mean_active(numbers, self.num_experts)}, active are {self.num_active}",
                f"a layer that stays dense has as many as --experts in {option}",
            )

    @property
    def cut_counts(self) -> tuple[int, ...]:
        """Active experts of every layer that is cut; one number where they are alike."""
        if not self.active_by_layer:
            return (self.num_active,)
        return tuple(number for number in self.active_by_layer if 0 < number < self.num_experts)

    def of_layer(self, layer: int) -> "Layout":
        """The layout that a layer has, in which all layers are alike."""
        number = self.active_by_layer[layer] if self.active_by_layer else 0
        if not 0 < number < self.num_experts:
            return self if not self.active_by_layer else replace(self, active_by_layer=())
        shared = number if self.is_static else self.num_shared
        return replace(self, num_shared=shared, num_active=number, active_by_layer=())

    @property
    def is_adaptive(self) -> bool:
        """A token's scores say how many experts it gets."""
        return self.max_active > 0

    @property
    def routed_range(self) -> tuple[int, int]:
        """Least and most routed experts of a token."""
        if self.is_adaptive:
            return self.min_active - self.num_shared, self.max_active - self.num_shared
        return self.num_routed_active, self.num_routed_active

    @property
    def num_routed(self) -> int:
        return self.num_experts - self.num_shared

    @property
    def num_routed_active(self) -> int:
        return self.num_active - self.num_shared

    @property
    def is_static(self) -> bool:
        """Nothing is routed: the active slices are always the same, which is static pruning."""
        return self.num_routed_active == 0

    @property
    def is_whole(self) -> bool:
        """Nothing is cut away or routed: every slice is always on."""
        return self.num_shared == self.num_experts

    @property
    def active_share(self) -> float:
        """Share of a cut FFN that a token uses, in the mean over layers."""
        return sum(self.cut_counts) / len(self.cut_counts) / self.num_experts

    def model_share(self, num_layers: int, num_dropped: int = 0) -> float:
        """Share of all FFN parameters that a token uses.

        Args:
            num_layers: of the layout's model.
            num_dropped: layers that the dense model had besides.
        """
        dense = len(self.dense_layers)
        return (dense + (num_layers - dense) * self.active_share) / (num_layers + num_dropped)

    def expert_width(self, num_neurons: int) -> int:
        """Neurons in one slice.

        Raises:
            InputError: the slices would not be equal; the hint lists expert counts that work.
        """
        if num_neurons % self.num_experts:
            works = [str(n) for n in range(2, 129) if num_neurons % n == 0]
            raise InputError(
                f"{num_neurons} neurons do not divide into {self.num_experts} experts",
                f"--experts {', '.join(works)} work for this model" if works else "",
            )
        return num_neurons // self.num_experts


def resolve_layout(
    experts: int,
    shared: int | None,
    active: int | None,
    *,
    holds_shared: bool,
    dense_layers: tuple[int, ...] = (),
    active_by_layer: tuple[int, ...] = (),
) -> Layout:
    """Fill in what is open: 3/4 active, of these a quarter shared, and at most half of the active ones of any layer.

    Of 8 and 32 experts on SmolLM2-135M, at 75 % and 50 % active, a third to a sixth of the active ones shared had the
    least layer error, up to 7 % less than with half of them shared.
    """
    if active_by_layer:
        active = mean_active(active_by_layer, experts)
    if active is None:
        active = max(1, experts * 3 // 4)
    if shared is None:
        least = min((number for number in active_by_layer if number > 0), default=active)
        shared = min(-(-active // 4), max(1, least // 2)) if holds_shared and least > 1 else 0
    return Layout(experts, shared, active, dense_layers, active_by_layer=active_by_layer)


def mean_active(numbers: tuple[int, ...], num_experts: int) -> int:
    """Active experts of the layers that are cut, in the mean."""
    cut = [number for number in numbers if 0 < number < num_experts]
    return max(1, round(sum(cut) / len(cut))) if cut else num_experts


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
        threshold_1: score above which an expert is chosen; None where every token gets as many.
    """

    layer: int
    labels_F: Tensor
    router_RD: Tensor | None
    down_DF: Tensor | None = None
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    units_HC: Tensor | None = None
    threshold_1: Tensor | None = None

    def check(self, layout: Layout) -> None:
        """Raise InputError unless every expert has exactly its share of neurons."""
        if self.labels_F.ndim != 1 or self.labels_F.dtype != torch.int16 or int(self.labels_F.min()) < SHARED:
            raise InputError(
                f"layer {self.layer} of the plan has no int16 labels of {SHARED} and up, one a neuron", DAMAGED
            )
        width = layout.expert_width(self.labels_F.numel())
        if self.layer in layout.dense_layers:
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
        rows = 0 if self.router_RD is None else self.router_RD.shape[0]
        expected = 0 if layout.is_static or self.layer in layout.dense_layers else layout.num_routed
        if rows != expected:
            raise InputError(f"layer {self.layer} of the plan has {rows} router rows, expected {expected}", DAMAGED)
        if expected and (self.threshold_1 is not None) != layout.is_adaptive:
            raise InputError(f"layer {self.layer} of the plan and its layout differ in how experts are chosen", DAMAGED)
        parts = (self.router_RD, self.units_HC, self.threshold_1)
        if any(part is not None and not part.isfinite().all() for part in parts):
            raise InputError(f"layer {self.layer} of the plan has a router with NaN or infinite values", DAMAGED)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a safetensors file holds of it, by name; diagnostics are left to the caller."""
        router = {"router": self.router_RD, "router_units": self.units_HC, "router_threshold": self.threshold_1}
        parts = {"labels": self.labels_F, "down": self.down_DF, **router}
        return {f"{prefix}{name}": part.contiguous() for name, part in parts.items() if part is not None}

    @classmethod
    def read(cls, reader: Any, layer: int, prefix: str = "") -> "LayerPlan":
        """The inverse of `tensors`, from an open safetensors file.

        Raises:
            SafetensorError: the file has no such labels.
        """
        names = set(reader.keys())
        router_RD, down_DF, units_HC, threshold_1 = (
            reader.get_tensor(prefix + name) if prefix + name in names else None
            for name in ("router", "down", "router_units", "router_threshold")
        )
        labels_F = reader.get_tensor(f"{prefix}labels")
        return cls(layer, labels_F, router_RD, down_DF, units_HC=units_HC, threshold_1=threshold_1)

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
