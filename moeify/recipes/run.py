"""Running a recipe: its stages in a fixed order, finished ones skipped, limits last."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from moeify.benchmark.models.results import ModelBench
from moeify.benchmark.models.run import FILE as BENCH_FILE
from moeify.benchmark.models.run import bench, load_bench
from moeify.benchmark.options import BenchOptions
from moeify.check.compare import compare
from moeify.check.evaluate import EvalResult, evaluate
from moeify.check.verify import TOLERANCE, VerifyReport, verify
from moeify.convert.pipeline import split
from moeify.convert.prepare import Preview, preview
from moeify.models.dense import open_dense
from moeify.options import SplitOptions, Track, untracked
from moeify.recipes.limits import Limit, check_quality, check_times, judged
from moeify.recipes.model import MAIN, TRAINED, Recipe, control_options
from moeify.results import write
from moeify.training.finetune import finetune
from moeify.training.options import FinetuneOptions
from moeify.version import __version__


@dataclass(frozen=True)
class RunResult:
    """What a recipe gave; also stored as run.json beside the checkpoints."""

    out: Path
    skipped: tuple[str, ...]
    verify: VerifyReport | None
    evals: tuple[EvalResult, ...]
    limits: tuple[Limit, ...]

    @property
    def passed(self) -> bool:
        return all(limit.passed for limit in self.limits) and (self.verify is None or self.verify.passed)


@dataclass(frozen=True)
class RunPreview:
    """What a run would do.

    Args:
        out: its folder.
        splits: by folder, what each would do and cost.
        finished: of these, what is there already.
        further: stages that follow.
    """

    out: Path
    splits: Mapping[str, Preview]
    finished: tuple[str, ...]
    further: tuple[str, ...]


def run(recipe: Recipe, *, track: Track[Any] = untracked) -> RunResult:
    """Run all stages; a stage whose inputs have not changed since it finished is skipped.

    Raises:
        InputError, UsageError: as the stages do.
    """
    out = recipe.out
    skipped: list[str] = []
    splits = _splits(recipe)
    source = open_dense(recipe.model, track).fingerprint()
    for name, options in splits.items():
        key = _key(source, options, options.calibration)
        if _done(out / name, key):
            skipped.append(name)
            continue
        split(recipe.model, out / name, options, overwrite=True, track=track)
        _mark(out / name, key)
    for name in recipe.trained:
        _finetune(recipe, name, source, skipped, track)
    if recipe.compare is not None:
        _compare(recipe, track)
    report = None
    if recipe.verify:
        tolerance = recipe.limits.max_logit_difference or TOLERANCE
        report = verify(str(out / MAIN), recipe.model, tolerance=tolerance)
    evals: tuple[EvalResult, ...] = ()
    if recipe.eval is not None:
        names = [*splits, *(name + TRAINED for name in recipe.trained)]
        models = [recipe.model, *(str(out / name) for name in names)]
        evals = tuple(evaluate(models, **asdict(recipe.eval), track=track))
    speeds = _bench(recipe, source, splits, skipped, track) if recipe.bench else None
    limits = (*check_quality(recipe, report, evals), *check_times(recipe, speeds))
    result = RunResult(out, tuple(skipped), report, evals, limits)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    write(result, out / "run.json")
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


def _compare(recipe: Recipe, track: Track[Any]) -> None:
    """Published methods; the losses of finished ones are kept beside the result, so they are not measured again."""
    assert recipe.compare is not None
    methods = recipe.compare
    compare(
        recipe.model,
        methods.budget,
        methods.data,
        # Budgets say how much is active.
        replace(recipe.split, active=None, shared=None, budget=None),
        tokens=methods.data_tokens,
        only=methods.method,
        out=recipe.out / "compare.json",
        track=track,
    )


def _bench(
    recipe: Recipe, source: str, splits: Mapping[str, SplitOptions], skipped: list[str], track: Track[Any]
) -> ModelBench:
    """The main split beside the dense model and its pruned controls, unless that was measured with the same inputs."""
    assert recipe.bench is not None
    controls = [name for name, options in splits.items() if options.static]
    main, *others = (judged(recipe, name) for name in (MAIN, *controls))
    records = [(Path(folder) / "moeify.json").read_text() for folder in (main, *others)]
    key = _key(source + "".join(records), recipe.bench, recipe.bench.data)
    marker = recipe.out / f"{BENCH_FILE}.done"
    if (recipe.out / BENCH_FILE).is_file() and marker.is_file() and marker.read_text() == key:
        skipped.append("bench")
        return load_bench(recipe.out)
    marker.unlink(missing_ok=True)
    result = bench([main], [recipe.model, *others], recipe.bench, out=recipe.out, overwrite=True, track=track)
    marker.write_text(key)
    return result


def preview_run(recipe: Recipe, *, track: Track[Any] = untracked) -> RunPreview:
    """Settle what the run would do and cost, as far as that is known before it; reads headers, writes nothing.

    Raises:
        InputError, UsageError: as the splits would.
    """
    source = open_dense(recipe.model, track).fingerprint()
    splits = _splits(recipe)
    finished = [name for name, o in splits.items() if _done(recipe.out / name, _key(source, o, o.calibration))]
    previews = {name: preview(recipe.model, options, track=track) for name, options in splits.items()}
    further = [name + TRAINED for name in recipe.trained]
    further += [name for name in ("compare", "verify", "eval", "bench") if getattr(recipe, name)]
    return RunPreview(recipe.out, previews, tuple(finished), tuple(further))


def _splits(recipe: Recipe) -> dict[str, SplitOptions]:
    """All that are made, by folder."""
    controls = {name: control_options(recipe, name, control) for name, control in recipe.controls.items()}
    return {MAIN: recipe.split, **controls}


def _key(source: str, options: SplitOptions | FinetuneOptions | BenchOptions, texts: Sequence[str]) -> str:
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
