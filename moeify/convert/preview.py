"""What `moeify split --dry-run` shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify import engines
from moeify.convert.estimate import Estimate, count_parameters, estimate
from moeify.convert.prepare import prepare
from moeify.errors import UsageError
from moeify.layout import Layout
from moeify.models.dense import DenseModel, open_dense
from moeify.options import SplitOptions, Track
from moeify.progress import shown
from moeify.readable import Readable


@dataclass(frozen=True, repr=False)
class Preview(Readable):
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
    engines: tuple[engines.Verdict, ...]


def preview(
    model: str | Path | DenseModel, options: SplitOptions | None = None, *, track: Track[Any] = shown, **choices: Any
) -> Preview:
    """Settle everything that a split settles before it reads text, and estimate the rest. Writes nothing.

    Args:
        model, options, track, choices: as of `split`.

    Raises:
        InputError: the model cannot be split in this way.

    Example:
        plan = moeify.preview("builtin", experts=8, active=4)
        print(plan.target, plan.estimate.duration_s, plan.estimate.checkpoint_bytes)
    """
    options = SplitOptions.chosen(options, choices)
    if options.budget is not None:
        raise UsageError("a budget is settled by scoring layers", "moeify search shows what it would choose")
    prepared = prepare(open_dense(model, track), options)
    prepared.warn_of_engines()
    return Preview(
        prepared.dense.name,
        prepared.dense.family.model_type,
        prepared.dense.num_layers,
        prepared.target.model_type,
        prepared.target_reason,
        prepared.layout,
        prepared.layout.expert_width(prepared.dense.num_neurons),
        *count_parameters(prepared.writer),
        str(prepared.dtype).removeprefix("torch."),
        prepared.options,
        estimate(prepared),
        prepared.engines,
    )
