"""Recipes: one YAML a result; what may stand in one. run.py runs them.

version: 1
model: builtin
out: runs/quickstart
split: {experts: 8}                          # the options of `moeify split`
controls: {static: {static: true}}           # further splits of the same model, for comparison
finetune: {tokens: 65536}                    # the options of `moeify finetune`; the dense model is the teacher
finetune_controls: [static]                  # controls that are trained in the same way
verify: true
compare: {budget: [0.5]}                     # the options of `moeify compare`: published methods beside ours
eval: {data: [builtin-heldout]}              # the options of `moeify eval`
bench: {batch: [1]}                          # the options of `moeify bench`: beside dense and the static controls
limits: {max_ratio: 1.5, beats: [static], max_decode_time: 1.0}
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from moeify.benchmark.models.results import Phase
from moeify.benchmark.options import BenchOptions
from moeify.command_line import Options, check_text, fields, is_repeated, several
from moeify.errors import InputError, UsageError, nearest, unknown
from moeify.options import CompareOptions, EvalOptions, SplitOptions
from moeify.plugin_list import listing as entries
from moeify.plugin_list import recipe_folders
from moeify.recipes.names import MAIN, PathPart, check_different
from moeify.recipes.plain_yaml import load_yaml
from moeify.training.options import FinetuneOptions
from moeify.words import listing

# Shaped like the recipe, so that errors name the place in it.
_CONTROLS = TypeAdapter(dict[str, dict[str, SplitOptions]])
# Sections that have a command's options, under its name.
SECTIONS: dict[str, type[Options]] = {
    "split": SplitOptions,
    "finetune": FinetuneOptions,
    "compare": CompareOptions,
    "eval": EvalOptions,
    "bench": BenchOptions,
}
NOT_STATIC = ("budget", "dense_layers", "experts_by_layer", "static_layers", "mixing", "temperature", "fusion")


def _text(value: Any) -> Any:
    """Not empty, and one that a file may have for a name."""
    return check_text(value) if isinstance(value, str) else value


def _inside(path: Path) -> Path:
    """A folder that has a name: nothing is written beside everything else."""
    if path.resolve().parent == path.resolve():
        raise ValueError("expected a folder other than the root of the disk")
    return path


Text = Annotated[str, BeforeValidator(_text)]
Folder = Annotated[Path, BeforeValidator(_text), AfterValidator(_inside)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """A section that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Strict):
    """What must hold for the run to pass; ratios are of perplexities, and each text is checked.

    Where there are none, of images and the like, controls are beaten by the cosine of features to the dense model's.

    What was fine-tuned is judged as it is then.

    Args:
        max_ratio: the main split over dense at most.
        beats: controls whose perplexity the main split must stay under.
        max_drop: what the score of a task, a share of right answers, may lose to the dense model's.
        max_logit_difference: of `verify`.
        max_decode_time, max_prefill_time: of the main split over dense at most, on its fastest implementation at every
            batch and prompt that `bench` measures; a time fails if its whole interval lies above.
    """

    max_ratio: Positive | None = None
    beats: tuple[str, ...] = ()
    max_drop: Positive | None = None
    max_logit_difference: Positive | None = None
    max_decode_time: Positive | None = None
    max_prefill_time: Positive | None = None

    @property
    def max_times(self) -> dict[Phase, float]:
        """Of the phases that have a limit."""
        limits: dict[Phase, float | None] = {"decode": self.max_decode_time, "prefill": self.max_prefill_time}
        return {phase: limit for phase, limit in limits.items() if limit is not None}


class Recipe(Strict):
    """A whole recipe; keys are the command line's option names.

    `compare` calibrates like the main split, with as many experts, the same seed and device.
    """

    version: Literal[1]
    model: Text
    out: Folder
    split: SplitOptions = SplitOptions()
    controls: dict[PathPart, dict[str, Any]] = Field(default_factory=dict)
    finetune: FinetuneOptions | None = None
    finetune_controls: tuple[str, ...] = ()
    verify: bool = True
    compare: CompareOptions | None = None
    eval: EvalOptions | None = None
    bench: BenchOptions | None = None
    limits: Limits = Limits()

    @field_validator("split", "finetune", "compare", "eval", "bench", mode="wrap")
    @classmethod
    def _name_the_section(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Options refuse values by their names on the command line, which several sections share."""
        try:
            return validate(_with_lists(SECTIONS[str(info.field_name)], value))
        except UsageError as error:
            raise UsageError(f"{info.field_name}: {error}", error.hint) from error

    @field_validator("controls")
    @classmethod
    def _name_folders_apart(cls, controls: dict[str, Any]) -> dict[str, Any]:
        check_different(controls)
        return controls

    @property
    def trained(self) -> tuple[str, ...]:
        """The splits that are fine-tuned."""
        return (MAIN, *self.finetune_controls) if self.finetune else ()


def _with_lists(kind: type[Options], values: Any) -> Any:
    """The values of a section, with a list of one item where an item stands alone."""
    if not isinstance(values, Mapping):
        return values
    lists = {field.name for field in fields(kind) if is_repeated(field)}
    return {
        key: [value] if key in lists and isinstance(value, str | int | float) else value
        for key, value in values.items()
    }


def find_recipe(name: str) -> Path:
    """The file itself, or the recipe of that name which comes with moeify."""
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    files = [folder / f"{name}.yaml" for folder in recipe_folders()]
    return next((file for file in files if file.is_file()), Path(name))


def load_recipe(path: str | Path, overrides: str | Sequence[str] = (), *, out: str | Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file, or the name of a recipe that comes with moeify.
        overrides: `section.key=value`, the value read as YAML.
        out: the folder of the run; the recipe's own if it is None.

    Raises:
        InputError: no such file, or not YAML of plain values.
        UsageError: an unknown key or a value of the wrong kind; the message names it.

    Example:
        recipe = moeify.load_recipe("quickstart", "split.experts=16", out="runs/sixteen")
        moeify.run(recipe)
    """
    path, overrides = find_recipe(str(path)), several(overrides)
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", "a recipe is a YAML file; see `moeify ls recipes`"
        ) from error
    if data is None:
        beside = Path(f"{path}.yaml")
        similar = str(beside) if beside.is_file() else nearest(path.stem, entries("recipes").entries)
        question = f"did you mean {similar}? " if similar else ""
        raise InputError(f"no recipe at {path}", f"{question}`moeify ls recipes` lists those that come with moeify")
    values = load_yaml(data, str(path))
    if not isinstance(values, dict):
        raise InputError(
            f"{path} holds {type(values).__name__}, expected a mapping of sections",
            "`moeify ls recipes` lists those that come with moeify; copy one",
        )
    for override in overrides:
        _override(values, override)
    if out is not None:
        values["out"] = str(out)
    try:
        recipe = Recipe.model_validate(values)
        for name, control in recipe.controls.items():
            control_options(recipe, name, control)
    except ValidationError as error:
        raise _named(path, error) from error
    _check_sections(path, recipe)
    return recipe


def _check_sections(path: Path, recipe: Recipe) -> None:
    """Raise UsageError if a section needs another one."""
    if recipe.eval is None and (recipe.limits.beats or recipe.limits.max_ratio is not None):
        raise UsageError(f"{path}: limits on perplexity need an eval section", "add: eval: {}")
    if recipe.limits.max_drop is not None and not (recipe.eval and recipe.eval.tasks):
        raise UsageError(f"{path}: limits.max_drop needs tasks in the eval section", "add: eval: {tasks: [digits]}")
    timed = recipe.bench is not None and "speed" not in recipe.bench.skip and "transformers" in recipe.bench.engine
    if recipe.limits.max_times and not timed:
        raise UsageError(
            f"{path}: limits on times need a bench section that measures speed in transformers", "add: bench: {}"
        )
    if recipe.limits.max_logit_difference is not None and not recipe.verify:
        raise UsageError(f"{path}: limits.max_logit_difference needs verify: true", "leave verify out")
    for key, names in (("limits.beats", recipe.limits.beats), ("finetune_controls", recipe.finetune_controls)):
        if strange := [name for name in names if name not in recipe.controls]:
            told = unknown("a control", strange[0], recipe.controls)
            raise UsageError(f"{path}: {key}: {told}", told.hint if recipe.controls else "add it under controls")
    if recipe.finetune_controls and recipe.finetune is None:
        raise UsageError(f"{path}: finetune_controls needs a finetune section", "add: finetune: {}")


def _override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`."""
    key, separator, value = override.partition("=")
    *sections, last = key.split(".")
    hint = "write --set split.experts=16"
    if not separator or not all((*sections, last)):
        raise UsageError(f"--set {override} is not key=value", hint)
    for section in sections:
        # A section may stand there empty.
        values[section] = {} if values.get(section) is None else values[section]
        values = values[section]
        if not isinstance(values, dict):
            raise UsageError(f"--set {key}: {section} holds {values!r}, not a section", hint)
    try:
        values[last] = load_yaml(value.encode(errors="surrogatepass"), f"--set {key}")
    except InputError as error:
        raise UsageError(str(error), hint) from error


def _named(path: Path, error: ValidationError) -> UsageError:
    """The first mistake: its place, what is expected there, and the value."""
    first = error.errors(include_url=False)[0]
    # Keys are marked by a word of pydantic's own.
    where = [str(part) for part in first["loc"] if part != "[key]"]
    if not where:
        # A key that is no text.
        return UsageError(f"{path}: {first['msg']}, found {first['input']!r:.100}", "keys are the names of options")
    message = f"{path}: {'.'.join(where)}: {first['msg'].removeprefix('Value error, ')}, found {first['input']!r:.100}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        what = f"a key of {'.'.join(where[:-1])}" if where[1:] else "a section of a recipe"
        told = unknown(what, where[-1], _keys(where[:-1]))
        place = f"{'.'.join(where)}: " if where[1:] else ""
        return UsageError(f"{path}: {place}{told}", told.hint)
    if first["type"] == "missing":
        return UsageError(f"{path}: {'.'.join(where)} is missing", f"every recipe has {listing(list(_needed()))}")
    similar = nearest(str(first["input"]), re.findall(r"'(.+?)'", first["msg"])) if "'" in first["msg"] else ""
    command = where[0] if where[0] in SECTIONS else "split" if where[0] == "controls" else "run"
    question = f"did you mean {similar}? " if similar else ""
    return UsageError(message, f"{question}`moeify {command} --help` says what its options take")


def _keys(place: Sequence[str]) -> list[str]:
    """The keys that may stand at a place of a recipe."""
    if not place or place[0] == "limits":
        return list((Limits if place else Recipe).model_fields)
    return [field.name for field in fields(SECTIONS.get(place[0], SplitOptions))]


def _needed() -> list[str]:
    return [name for name, field in Recipe.model_fields.items() if field.is_required()]


def control_options(recipe: Recipe, name: str, control: Mapping[str, Any]) -> SplitOptions:
    """The main split's options with the control's in place of them; what follows from the method is left open."""
    base = {key: value for key, value in asdict(recipe.split).items() if key not in ("shared", "target", "plan")}
    if control.get("static"):
        budget, experts = recipe.split.budget, control.get("experts", recipe.split.experts)
        if experts is None:
            # The main split's number follows from what engines run, which no pruned model's does.
            hint = "name the number of experts: split: {experts: 8}"
            raise UsageError(f"controls.{name}: static pruning needs split.experts to be as large as the split", hint)
        base["active"] = recipe.split.active if budget is None else max(1, round(budget * experts))
        # A pruned model has FFNs of one width and nothing to weight.
        base = {key: value for key, value in base.items() if key not in NOT_STATIC}
    try:
        return _CONTROLS.validate_python({"controls": {name: _with_lists(SplitOptions, {**base, **control})}})[
            "controls"
        ][name]
    except UsageError as error:
        raise UsageError(f"controls.{name}: {error}", error.hint) from error
