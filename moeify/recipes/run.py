"""Running a recipe: its stages in a fixed order, finished ones skipped, limits last."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from moeify.benchmark.models.results import ModelBench
from moeify.benchmark.models.run import FILE as BENCH_FILE
from moeify.benchmark.models.run import bench, load_bench
from moeify.cache import digest, intact, replacing
from moeify.check.compare import compare
from moeify.check.evaluate import evaluate
from moeify.check.perplexity import EvalResult
from moeify.check.verify import TOLERANCE, VerifyReport, verify
from moeify.convert.pipeline import split
from moeify.convert.prepare import Preview, preview
from moeify.export.record import RECORD_FILE
from moeify.models.dense import DenseModel, open_dense
from moeify.options import SplitOptions, Track, untracked
from moeify.recipes.limits import Limit, check_quality, check_times, judged
from moeify.recipes.model import MAIN, TRAINED, Recipe, control_options
from moeify.results import write
from moeify.training.finetune import finetune


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
    splits = _splits(recipe)
    dense = open_dense(recipe.model, track)
    stages = _Stages(recipe, dense, track)
    for name, options in splits.items():
        stages.split(name, options)
    for name in recipe.trained:
        stages.finetune(name)
    if recipe.compare is not None:
        stages.compare()
    report = None
    if recipe.verify:
        tolerance = recipe.limits.max_logit_difference or TOLERANCE
        report = verify(out / MAIN, dense, tolerance=tolerance)
    evals: tuple[EvalResult, ...] = ()
    if recipe.eval is not None:
        names = [*splits, *(name + TRAINED for name in recipe.trained)]
        models = [recipe.model, *(str(out / name) for name in names)]
        evals = tuple(evaluate(models, **asdict(recipe.eval), track=track))
    speeds = stages.bench([name for name, options in splits.items() if options.static]) if recipe.bench else None
    limits = (*check_quality(recipe, report, evals), *check_times(recipe, speeds))
    result = RunResult(out, tuple(stages.skipped), report, evals, limits)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    write(result, out / "run.json")
    return result


@dataclass(frozen=True)
class _Stages:
    """The stages of a recipe whose results stay in its folder.

    Args:
        dense: the model, opened once.
        skipped: names of stages whose results were there.
    """

    recipe: Recipe
    dense: DenseModel
    track: Track[Any]
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def source(self) -> str:
        """Fingerprint of the dense model."""
        return self.dense.fingerprint()

    def split(self, name: str, options: SplitOptions) -> None:
        out = self.recipe.out / name
        work = partial(split, self.dense, out, options, overwrite=True, track=self.track)
        self._once(name, out / RECORD_FILE, _split_key(self.source, options), work)

    def finetune(self, name: str) -> None:
        """Train one of the splits against the dense model."""
        options = self.recipe.finetune
        assert options is not None
        student, out = self.recipe.out / name, self.recipe.out / (name + TRAINED)
        key = digest(self.source, student / RECORD_FILE, options, *map(Path, (*options.data, *options.eval_data)))
        work = partial(finetune, str(student), self.dense, out, options, overwrite=True, track=self.track)
        self._once(out.name, out / RECORD_FILE, key, work)

    def compare(self) -> None:
        """Published methods; a comparison keeps its own results in the cache."""
        section = self.recipe.compare
        assert section is not None
        # Budgets say how much is active.
        options = replace(self.recipe.split, active=None, shared=None, budget=None)
        compare(
            self.dense,
            section.budget,
            section.data,
            options,
            tokens=section.data_tokens,
            only=section.method,
            out=self.recipe.out / "compare.json",
            track=self.track,
        )

    def bench(self, static: Sequence[str]) -> ModelBench:
        """The main split beside the dense model and the pruned controls."""
        recipe, options = self.recipe, self.recipe.bench
        assert options is not None
        main, *others = (judged(recipe, name) for name in (MAIN, *static))
        records = (Path(folder) / RECORD_FILE for folder in (main, *others))
        key = digest(self.source, *records, options, *map(Path, options.data))
        work = partial(bench, [main], [recipe.model, *others], options, out=recipe.out, overwrite=True)
        self._once("bench", recipe.out / BENCH_FILE, key, partial(work, track=self.track))
        return load_bench(recipe.out)

    def _once(self, name: str, result: Path, key: str, work: Callable[[], Any]) -> None:
        """Do a stage unless it is done.

        Args:
            name: of the stage.
            result: the file that it writes last.
            key: digest of its inputs.
            work: the stage.
        """
        if _is_done(self.recipe.out, name, result, key):
            self.skipped.append(name)
            return
        work()
        with replacing(_marker(self.recipe.out, name)) as temporary:
            temporary.write_text(digest(key, result))


def preview_run(recipe: Recipe, *, track: Track[Any] = untracked) -> RunPreview:
    """Settle what the run would do and cost, as far as that is known before it; reads headers, writes nothing.

    Raises:
        InputError, UsageError: as the splits would.
    """
    dense, splits = open_dense(recipe.model, track), _splits(recipe)
    source = dense.fingerprint()
    finished = [
        name
        for name, options in splits.items()
        if _is_done(recipe.out, name, recipe.out / name / RECORD_FILE, _split_key(source, options))
    ]
    previews = {name: preview(dense, options) for name, options in splits.items()}
    further = [name + TRAINED for name in recipe.trained]
    further += [name for name in ("compare", "verify", "eval", "bench") if getattr(recipe, name)]
    return RunPreview(recipe.out, previews, tuple(finished), tuple(further))


def _splits(recipe: Recipe) -> dict[str, SplitOptions]:
    """All that are made, by folder."""
    controls = {name: control_options(recipe, name, control) for name, control in recipe.controls.items()}
    return {MAIN: recipe.split, **controls}


def _split_key(source: str, options: SplitOptions) -> str:
    return digest(source, options, *map(Path, options.calibration))


def _is_done(out: Path, name: str, result: Path, key: str) -> bool:
    """The marker binds the inputs to the very result: another checkpoint may have been put into its place."""
    return result.is_file() and intact(_marker(out, name), Path.read_text) == digest(key, result)


def _marker(out: Path, name: str) -> Path:
    return out / f"{name}.done"
