"""Recipes: one YAML a result. Stages run in a fixed order, finished ones are skipped, gates fail the run.

version: 1
model: builtin
out: runs/quickstart
split: {experts: 8}                          # the options of `moeify split`
controls: {static: {static: true}}           # further splits of the same model, for comparison
finetune: {tokens: 65536}                    # the options of `moeify finetune`; the dense model is the teacher
finetune_controls: [static]                  # controls that are trained in the same way
verify: true
eval: {data: [builtin-heldout]}
gates: {max_ratio: 1.5, beats: [static]}
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeify.checkpoint import open_dense
from moeify.errors import InputError, UsageError
from moeify.evaluate import EvalResult, evaluate
from moeify.finetune import finetune
from moeify.listing import recipe_folders
from moeify.options import SplitOptions, Track, untracked
from moeify.split import split
from moeify.training.options import FinetuneOptions
from moeify.verify import TOLERANCE, VerifyReport, verify
from moeify.version import __version__

MAIN = "moe"
NOT_STATIC = ("budget", "dense_layers", "gate", "temperature", "fusion")
TRAINED = "-finetuned"
DENSE = "dense"


class Strict(BaseModel):
    """A section that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EvalSection(Strict):
    """Options of `moeify eval`."""

    data: tuple[str, ...] = ("builtin-heldout",)
    tokens: int = Field(default=8192, ge=2)
    context: int | None = Field(default=None, ge=2)
    stride: int | None = Field(default=None, ge=1)
    dtype: str = "auto"
    device: str = "cpu"


class Gates(Strict):
    """What must hold for the run to pass; ratios are of perplexities, and each text is checked.

    What was fine-tuned is judged as it is then.

    Args:
        max_ratio: the main split over dense at most.
        beats: controls whose perplexity the main split must stay under.
        max_logit_difference: of `verify`.
    """

    max_ratio: float | None = Field(default=None, gt=0)
    beats: tuple[str, ...] = ()
    max_logit_difference: float | None = Field(default=None, gt=0)


class Recipe(Strict):
    """A whole recipe; keys are the command line's option names."""

    version: Literal[1]
    model: str
    out: Path
    split: SplitOptions = SplitOptions()
    controls: dict[str, dict[str, Any]] = Field(default_factory=dict)
    finetune: FinetuneOptions | None = None
    finetune_controls: tuple[str, ...] = ()
    verify: bool = True
    eval: EvalSection | None = None
    gates: Gates = Gates()


@dataclass(frozen=True)
class Gate:
    """One gate and how it came out."""

    name: str
    found: str
    limit: str
    passed: bool


@dataclass(frozen=True)
class RunResult:
    """What a recipe gave; also stored as run.json beside the checkpoints."""

    out: Path
    skipped: tuple[str, ...]
    verify: VerifyReport | None
    evals: tuple[EvalResult, ...]
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates) and (self.verify is None or self.verify.passed)


def find_recipe(name: str) -> Path:
    """The file itself, or the recipe of that name which comes with moeify."""
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    found = [folder / f"{name}.yaml" for folder in recipe_folders()]
    return next((path for path in found if path.is_file()), Path(name))


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
    if recipe.eval is None and (recipe.gates.beats or recipe.gates.max_ratio is not None):
        raise UsageError(f"{path}: gates on perplexity need an eval section")
    if recipe.gates.max_logit_difference is not None and not recipe.verify:
        raise UsageError(f"{path}: gates.max_logit_difference needs verify: true")
    for key, names in (("gates.beats", recipe.gates.beats), ("finetune_controls", recipe.finetune_controls)):
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

    class Wrapper(Strict):
        controls: SplitOptions

    return Wrapper.model_validate({"controls": {**base, **control}}).controls


def run(recipe: Recipe, *, track: Track[Any] = untracked) -> RunResult:
    """Run all stages; a stage whose inputs have not changed since it finished is skipped.

    Raises:
        InputError, UsageError: as the stages do.
    """
    out = recipe.out
    skipped: list[str] = []
    splits = {MAIN: recipe.split}
    splits |= {name: control_options(recipe, name, control) for name, control in recipe.controls.items()}
    source = open_dense(recipe.model, track).fingerprint()
    for name, options in splits.items():
        key = _key(source, options, options.calibration)
        if _done(out / name, key):
            skipped.append(name)
            continue
        split(recipe.model, out / name, options, overwrite=True, track=track)
        _mark(out / name, key)
    trained = (MAIN, *recipe.finetune_controls) if recipe.finetune else ()
    for name in trained:
        _finetune(recipe, name, source, skipped, track)
    report = None
    if recipe.verify:
        tolerance = recipe.gates.max_logit_difference or TOLERANCE
        report = verify(str(out / MAIN), recipe.model, tolerance=tolerance)
    evals: tuple[EvalResult, ...] = ()
    if recipe.eval is not None:
        names = [*splits, *(name + TRAINED for name in trained)]
        models = [recipe.model, *(str(out / name) for name in names)]
        evals = tuple(evaluate(models, **recipe.eval.model_dump(), track=track))
    result = RunResult(out, tuple(skipped), report, evals, _gates(recipe, report, evals))
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    values = {"schema": "moeify.run/1", **asdict(result)}
    (out / "run.json").write_text(json.dumps(values, indent=1, default=str) + "\n")
    return result


def _finetune(recipe: Recipe, name: str, source: str, skipped: list[str], track: Track[Any]) -> None:
    """Train one of the splits, unless that was done with the same inputs."""
    assert recipe.finetune is not None
    student, out = recipe.out / name, recipe.out / (name + TRAINED)
    options = recipe.finetune
    files = (*options.data, *options.eval_data)
    key = _key(source + (student / "moeify.json").read_text(), options, files)
    if _done(out, key):
        skipped.append(out.name)
        return
    finetune(str(student), recipe.model, out, options, overwrite=True, track=track)
    _mark(out, key)


def _judged(recipe: Recipe, name: str) -> str:
    """The folder that gates look at."""
    trained = recipe.finetune is not None and name in (MAIN, *recipe.finetune_controls)
    return str(recipe.out / (name + TRAINED if trained else name))


def _gates(recipe: Recipe, report: VerifyReport | None, evals: Sequence[EvalResult]) -> tuple[Gate, ...]:
    perplexity = {(result.model, result.data): result.perplexity for result in evals}
    main = _judged(recipe, MAIN)
    gates = []
    if report is not None:
        failed = [check.name for check in report.checks if not check.passed]
        gates.append(Gate("verify", ", ".join(failed) or "all checks hold", "all checks hold", report.passed))
    for data in recipe.eval.data if recipe.eval else ():
        found = perplexity[main, data]
        if recipe.gates.max_ratio is not None:
            ratio = found / perplexity[recipe.model, data]
            limit = recipe.gates.max_ratio
            gates.append(Gate(f"perplexity / dense on {data}", f"{ratio:.3f}", f"<= {limit:g}", ratio <= limit))
        for name in recipe.gates.beats:
            other = perplexity[_judged(recipe, name), data]
            gates.append(Gate(f"perplexity under {name} on {data}", f"{found:.3f}", f"< {other:.3f}", found < other))
    return tuple(gates)


def _key(source: str, options: SplitOptions | FinetuneOptions, texts: Sequence[str]) -> str:
    """Hash of everything a stage depends on: model, options, the texts' contents, moeify itself."""
    digest = hashlib.sha256(json.dumps([source, asdict(options), __version__], sort_keys=True).encode())
    for path in map(Path, texts):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _done(folder: Path, key: str) -> bool:
    marker = folder.with_name(f"{folder.name}.done")
    return (folder / "moeify.json").is_file() and marker.is_file() and marker.read_text() == _seal(folder, key)


def _mark(folder: Path, key: str) -> None:
    folder.with_name(f"{folder.name}.done").write_text(_seal(folder, key))


def _seal(folder: Path, key: str) -> str:
    """Binds the key to the very result: another checkpoint may have been put into its place."""
    return hashlib.sha256(key.encode() + (folder / "moeify.json").read_bytes()).hexdigest()
