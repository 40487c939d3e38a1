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

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
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
from moeify.errors import InputError, UsageError
from moeify.options import CompareOptions, EvalOptions, SplitOptions
from moeify.plugin_list import recipe_folders
from moeify.training.options import FinetuneOptions

MAIN = "moe"
# Shaped like the recipe, so that errors name the place in it.
_CONTROLS = TypeAdapter(dict[str, dict[str, SplitOptions]])
NOT_STATIC = ("budget", "dense_layers", "mixing", "temperature", "fusion")
TRAINED = "-finetuned"
DENSE = "dense"


class Strict(BaseModel):
    """A section that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Strict):
    """What must hold for the run to pass; ratios are of perplexities, and each text is checked.

    What was fine-tuned is judged as it is then.

    Args:
        max_ratio: the main split over dense at most.
        beats: controls whose perplexity the main split must stay under.
        max_logit_difference: of `verify`.
        max_decode_time, max_prefill_time: of the main split over dense at most, on its fastest implementation at every
            batch and prompt that `bench` measures; a time fails if its whole interval lies above.
    """

    max_ratio: float | None = Field(default=None, gt=0)
    beats: tuple[str, ...] = ()
    max_logit_difference: float | None = Field(default=None, gt=0)
    max_decode_time: float | None = Field(default=None, gt=0)
    max_prefill_time: float | None = Field(default=None, gt=0)

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
    model: str
    out: Path
    split: SplitOptions = SplitOptions()
    controls: dict[str, dict[str, Any]] = Field(default_factory=dict)
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
            return validate(value)
        except UsageError as error:
            raise UsageError(f"{info.field_name}: {error}", error.hint) from error

    @property
    def trained(self) -> tuple[str, ...]:
        """The splits that are fine-tuned."""
        return (MAIN, *self.finetune_controls) if self.finetune else ()


def find_recipe(name: str) -> Path:
    """The file itself, or the recipe of that name which comes with moeify."""
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    files = [folder / f"{name}.yaml" for folder in recipe_folders()]
    return next((file for file in files if file.is_file()), Path(name))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value read as YAML.

    Raises:
        InputError: no such file, or not YAML.
        UsageError: an unknown key or a value of the wrong kind; the message names it.
    """
    if not path.is_file():
        raise InputError(f"no recipe at {path}", "`moeify ls recipes` lists those that come with moeify")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}, expected a mapping")
    for override in overrides:
        _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
        for name, control in recipe.controls.items():
            control_options(recipe, name, control)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}: {where}: {first['msg']}, found {first['input']!r}") from error
    if recipe.eval is None and (recipe.limits.beats or recipe.limits.max_ratio is not None):
        raise UsageError(f"{path}: limits on perplexity need an eval section")
    if recipe.limits.max_times and (recipe.bench is None or "speed" in recipe.bench.skip):
        raise UsageError(f"{path}: limits on times need a bench section that measures speed")
    if recipe.limits.max_logit_difference is not None and not recipe.verify:
        raise UsageError(f"{path}: limits.max_logit_difference needs verify: true")
    for key, names in (("limits.beats", recipe.limits.beats), ("finetune_controls", recipe.finetune_controls)):
        unknown = [name for name in names if name not in recipe.controls]
        if unknown:
            raise UsageError(f"{path}: {key} names {unknown[0]!r}, which is not among the controls")
    if recipe.finetune_controls and recipe.finetune is None:
        raise UsageError(f"{path}: finetune_controls needs a finetune section")
    return recipe


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
        values[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {key}: {value} is not YAML", hint) from error


def control_options(recipe: Recipe, name: str, control: Mapping[str, Any]) -> SplitOptions:
    """The main split's options with the control's in place of them; what follows from the method is left open."""
    if name in (MAIN, DENSE):
        raise UsageError(f"a control cannot be called {name!r}")
    if name.endswith(TRAINED):
        raise UsageError(f"a control cannot be called {name!r}", f"what ends in {TRAINED} is trained")
    if Path(name).name != name:
        raise UsageError(f"a control cannot be called {name!r}", "it becomes a folder of that name")
    base = {key: value for key, value in asdict(recipe.split).items() if key not in ("shared", "target", "plan")}
    if control.get("static"):
        budget = recipe.split.budget
        base["active"] = recipe.split.active if budget is None else max(1, round(budget * recipe.split.experts))
        # A pruned model has FFNs of one width and nothing to weight.
        base = {key: value for key, value in base.items() if key not in NOT_STATIC}
    return _CONTROLS.validate_python({"controls": {name: {**base, **control}}})["controls"][name]
