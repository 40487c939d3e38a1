"""What a run may write into its folder: results of its own, and nothing that it did not make."""

from pathlib import Path

import yaml

from moeify import results
from moeify.errors import InputError
from moeify.export.record import check_replaceable
from moeify.recipes.markers import Stage, is_own, read_marker
from moeify.recipes.model import Recipe

RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"
# First line of the file; a recipe that someone wrote does not have it.
HEADER = "# What `moeify run` did here, with every default. Written by moeify, replaced by the next run.\n"


def recipe_text(recipe: Recipe) -> str:
    """The file that says what a run did."""
    return HEADER + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def check_folder(out: Path, stage: Stage, *, overwrite: bool) -> None:
    """Raise InputError if a stage would replace what it may not.

    Args:
        out: of the run.
        stage: what is going to be made.
        overwrite: results of moeify that this run folder did not make may be replaced.
    """
    place = stage.folder or stage.result
    marker = read_marker(out, stage.name)
    if stage.folder is not None:
        partial = stage.folder.with_name(f"{stage.folder.name}.partial")
        if marker is None and not overwrite and partial.is_dir() and any(partial.iterdir()):
            raise InputError(f"{partial} was not begun by this run", "--overwrite discards it, or choose another -o")
    if not place.exists() or (stage.folder is not None and place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite and not is_own(out, stage):
        what = "was put into the place of what this run made" if marker else "was not made by this run"
        raise InputError(f"{place} {what}", "--overwrite replaces it; or choose another -o")
    if stage.folder is not None:
        check_replaceable(place, overwrite=True)
    else:
        results.check_replaceable(place, results.find_kind(stage.name))
