"""What a dense model is and how it can be split, from its config and its safetensors headers alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify import targets
from moeify.convert.estimate import Estimate, estimate
from moeify.convert.exactness import check_target
from moeify.convert.layouts import MAX_EXPERTS, expert_counts, preferred_counts
from moeify.convert.prepare import prepare
from moeify.engines import Verdict
from moeify.errors import InputError
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.options import SplitOptions, Track
from moeify.progress import shown
from moeify.readable import Readable


@dataclass(frozen=True)
class TargetFit:
    """Whether one target represents the model exactly.

    Args:
        target: its name.
        fits: whether it does.
        shared: whether it has experts that are always on.
        reason: why it does not; of a target that does, the engines that know its architecture.
        difference: of the logits of a toy twin, relative to the largest; None if no twin could be made.
    """

    target: str
    fits: bool
    shared: bool
    reason: str
    difference: float | None


@dataclass(frozen=True, repr=False)
class Inspection(Readable):
    """A dense model as moeify sees it; `estimate` is of `moeify split` with `experts` experts and its defaults."""

    model: str
    family: str
    num_layers: int
    hidden_size: int
    num_neurons: int
    num_parameters: int
    ffn_share: float
    dtype: str
    expert_counts: tuple[int, ...]
    targets: tuple[TargetFit, ...]
    experts: int
    layout: Layout
    estimate: Estimate
    engines: tuple[Verdict, ...]


def inspect(model: str | Path | DenseModel, *, experts: int | None = None, track: Track[Any] = shown) -> Inspection:
    """Describe a model without loading a weight.

    Args:
        model: a folder, a .gguf file, a hub id or `builtin`.
        experts: what the fit of the targets and the estimates are made for; None takes the best for its width.
        track: shows the progress of making the embedded model.

    Raises:
        InputError: it cannot be read or its family is not supported.

    Example:
        model = moeify.inspect("builtin")
        print(model.expert_counts, [one.target for one in model.targets if one.fits])
    """
    dense = open_dense(model, track)
    neurons, hidden, layers = dense.num_neurons, dense.hidden_size, dense.num_layers
    counts = expert_counts(neurons, dense.dtype)
    if not counts:
        raise InputError(
            f"FFNs of {neurons} neurons do not divide into 2 to {MAX_EXPERTS} experts that can run",
            "no number of experts works for this model",
        )
    fits = tuple(_fit(dense, name, experts or preferred_counts(neurons, dense.dtype)[0]) for name in targets.names())
    # A number that does not work is looked at in the one that would be taken.
    options = SplitOptions(experts=experts if experts in counts else None)
    prepared = prepare(dense, options, writable=any(fit.fits for fit in fits))
    prepared.warn_of_engines()
    return Inspection(
        model=dense.name,
        family=dense.family.model_type,
        num_layers=layers,
        hidden_size=hidden,
        num_neurons=neurons,
        num_parameters=dense.num_parameters,
        ffn_share=layers * sum(t.numel() for t in dense.ffn_shapes.tensors().values()) / dense.num_parameters,
        dtype=str(dense.dtype).removeprefix("torch."),
        expert_counts=counts,
        targets=fits,
        experts=prepared.layout.num_experts,
        layout=prepared.layout,
        estimate=estimate(prepared),
        engines=prepared.engines,
    )


def _fit(dense: DenseModel, name: str, experts: int) -> TargetFit:
    """How a target fits the model, cut into so many experts."""
    target = targets.for_model(name, dense)
    layout = target.layout(experts)
    exactness = check_target(target, dense, layout, dtype=dense.dtype)
    reason = exactness.reason or target.loaded_by(layout)
    return TargetFit(name, exactness.exact, target.holds_shared, reason, exactness.difference)
