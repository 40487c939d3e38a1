"""What a run would do and cost, settled before it begins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.convert.preview import Preview, preview
from moeify.errors import warn
from moeify.models.dense import open_dense
from moeify.options import Track
from moeify.progress import said, shown
from moeify.readable import Readable
from moeify.recipes.estimate import Estimates, StagePreview, free_bytes
from moeify.recipes.lines import Lines
from moeify.recipes.model import Recipe
from moeify.recipes.run import Stages, all_splits, loaded
from moeify.words import size


@dataclass(frozen=True, repr=False)
class RunPreview(Readable):
    """What a run would do.

    Args:
        out: its folder.
        splits: by folder, what each would do and cost.
        stages: all stages in their order.
        free_bytes: on the disk of `out`.
    """

    out: Path
    splits: Mapping[str, Preview]
    stages: tuple[StagePreview, ...]
    free_bytes: int

    @property
    def duration_s(self) -> float:
        """Of all that is not finished, as far as it is known."""
        return sum(stage.duration_s for stage in self.stages if not math.isnan(stage.duration_s))

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)


def preview_run(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] | str = (),
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    track: Track[Any] = shown,
) -> RunPreview:
    """Settle what the run would do and cost, as far as that is known before it; reads headers, writes nothing.

    Args:
        recipe, overrides, out, overwrite, track: as of `run`.

    Raises:
        InputError, UsageError: as the run would before its first split.

    Example:
        for name, split in moeify.preview_run("quickstart").splits.items():
            print(name, split.estimate.duration_s)
    """
    recipe = loaded(recipe, overrides, out)
    splits = all_splits(recipe)
    stages = Stages(recipe, open_dense(recipe.model, track), Lines((), track, said))
    stages.check(splits, overwrite=overwrite)
    finished = tuple(name for name, options in splits.items() if stages.has_split(name, options))
    previews = {name: preview(stages.dense, options) for name, options in splits.items()}
    estimates = Estimates(recipe, stages.dense, previews, finished).stages()
    plan = RunPreview(recipe.out, previews, tuple(estimates), free_bytes(recipe.out))
    if plan.disk_bytes > plan.free_bytes:
        warn(f"{recipe.out} needs about {size(plan.disk_bytes)}, {size(plan.free_bytes)} are free on its disk")
    return plan
