"""Running a recipe: its stages in a fixed order, finished ones skipped, limits last."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moeify.benchmark.models.results import ModelBench
from moeify.benchmark.models.run import FILE as BENCH_FILE
from moeify.benchmark.models.run import bench, check_engines, load_bench
from moeify.benchmark.options import BenchOptions
from moeify.cache import digest
from moeify.check.compare import compare
from moeify.check.evaluate import Evaluation, measure
from moeify.check.loops import LoopResult
from moeify.check.perplexity import EvalResult
from moeify.check.scores import Score
from moeify.check.tasks import Tasks
from moeify.check.tasks_results import TaskResult
from moeify.check.verify import TOLERANCE, VerifyReport, verify
from moeify.command_line import command_line
from moeify.convert.pipeline import split
from moeify.errors import UsageError
from moeify.export.record import RECORD_FILE
from moeify.models.dense import DenseModel, open_dense
from moeify.options import Announce, SplitOptions, Track, untracked
from moeify.progress import said, shown
from moeify.readable import Readable
from moeify.recipes import markers
from moeify.recipes.cards import note_quality
from moeify.recipes.folder import HEADER, RECIPE_FILE, RUN_FILE, check_folder, recipe_text
from moeify.recipes.limits import Limit, check_quality, check_times, judged
from moeify.recipes.lines import Lines
from moeify.recipes.markers import Stage
from moeify.recipes.model import Recipe, control_options, load_recipe
from moeify.recipes.names import BENCH, COMPARE, EVAL, MAIN, TRAINED, VERIFY
from moeify.results import check_replaceable, write, write_text
from moeify.training.finetune import check_packages, finetune

# Options that a split or a training settles or counts anew: a record does not hold them as they were given.
SETTLED = (
    *("experts", "shared", "active", "active_by_layer", "experts_by_layer", "static_layers", "budget", "dense_layers"),
    *("drop_layers", "target", "context"),
    *("calibration", "device", "precision", "epochs", "every"),
)


@dataclass(frozen=True, repr=False)
class RunResult(Readable):
    """What a recipe gave; also stored as run.json beside the checkpoints."""

    out: Path
    skipped: tuple[str, ...]
    verify: VerifyReport | None
    evals: tuple[EvalResult, ...]
    limits: tuple[Limit, ...]
    tasks: tuple[TaskResult, ...] = ()
    loops: tuple[LoopResult, ...] = ()
    scores: tuple[Score, ...] = ()

    @property
    def passed(self) -> bool:
        return all(limit.passed for limit in self.limits) and (self.verify is None or self.verify.passed)


def run(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] | str = (),
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    track: Track[Any] = shown,
    announce: Announce = said,
) -> RunResult:
    """Run all stages; a stage whose inputs have not changed since it finished is skipped.

    Args:
        recipe: what to do: a YAML file, the name of a recipe that comes with moeify, or what `load_recipe` returned.
        overrides: keys of the file to change, such as `split.experts=16`.
        out: the folder of the run; the recipe's own if it is None.
        overwrite: replace also results that lie in its folder and were not made by this run or an earlier one of this
            folder.
        track: wraps long loops.
        announce: told which stage is finished.

    Raises:
        InputError: something lies in the folder that is not replaced; then nothing has been done. Or as the stages do.
        UsageError: as the stages do.

    Example:
        result = moeify.run("quickstart", "split.experts=16", out="runs/sixteen")
        assert result.passed
    """
    recipe = loaded(recipe, overrides, out)
    out, splits = recipe.out, all_splits(recipe)
    further = [*(name + TRAINED for name in recipe.trained), *_further(recipe)]
    stages = Stages(recipe, open_dense(recipe.model, track), Lines((*splits, *further), track, announce))
    stages.check(splits, overwrite=overwrite)
    stages.lines.begin(recipe.model, out)
    for name, options in splits.items():
        stages.split(name, options)
    for name in recipe.trained:
        stages.finetune(name)
    if recipe.compare is not None:
        stages.compare()
    report = stages.verify() if recipe.verify else None
    evaluation = Evaluation(())
    if recipe.eval is not None:
        names = [*splits, *(name + TRAINED for name in recipe.trained)]
        evaluation = stages.evaluate(names)
        for name in names:
            note_quality(out / name, evaluation)
    speeds = stages.bench() if recipe.bench else None
    limits = (*check_quality(recipe, report, evaluation), *check_times(recipe, speeds))
    measured = (evaluation.results, limits, evaluation.tasks, evaluation.loops, evaluation.scores)
    result = RunResult(out, tuple(stages.skipped), report, *measured)
    write_text(recipe_text(recipe), out / RECIPE_FILE, HEADER)
    write(result, out / RUN_FILE)
    return result


def loaded(recipe: Recipe | str | Path, overrides: Sequence[str] | str, out: str | Path | None) -> Recipe:
    """The recipe of a file or name.

    Raises:
        InputError, UsageError: as `load_recipe` does.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides, out=out)
    if overrides:
        raise UsageError("a recipe that is loaded takes no overrides", "hand them to load_recipe")
    return recipe if out is None else recipe.model_copy(update={"out": Path(out)})


def _further(recipe: Recipe) -> list[str]:
    """Names of the stages behind splits and training."""
    return [name for name in (COMPARE, VERIFY, EVAL, BENCH) if getattr(recipe, name)]


@dataclass(frozen=True)
class Stages:
    """The stages of a recipe whose results stay in its folder.

    Args:
        dense: the model, opened once.
        lines: say what is done.
        skipped: names of stages whose results were there.
    """

    recipe: Recipe
    dense: DenseModel
    lines: Lines
    skipped: list[str] = field(default_factory=list)

    @cached_property
    def source(self) -> str:
        """Fingerprint of the dense model."""
        return self.dense.fingerprint()

    def check(self, splits: Mapping[str, SplitOptions], *, overwrite: bool) -> None:
        """Raise InputError if a stage would replace something that it may not, or could not ask its tasks."""
        out = self.recipe.out
        if self.recipe.finetune is not None:
            check_packages(self.recipe.finetune)
        if self.recipe.bench is not None:
            check_engines(self.recipe.bench)
        for section in (self.recipe.compare, self.recipe.eval, self.recipe.bench):
            if section is not None:
                Tasks(section.tasks, section.questions, untracked)
        check_replaceable(out / RECIPE_FILE, HEADER)
        check_replaceable(out / RUN_FILE, RunResult)
        for name, options in splits.items():
            if not self.has_split(name, options):
                check_folder(out, self._split_stage(name, options), overwrite=overwrite)
        for name in self.recipe.trained:
            stage = self._finetune_stage(name)
            if not markers.is_done(out, stage, self._finetune_key(name)):
                check_folder(out, stage, overwrite=overwrite)
        sections = {COMPARE: self.recipe.compare, BENCH: self.recipe.bench}
        for stage in (self._compare_stage, self._bench_stage):
            if sections[stage.name] is not None:
                check_folder(out, stage, overwrite=overwrite)

    def has_split(self, name: str, options: SplitOptions) -> bool:
        """Whether that split is made."""
        return markers.is_done(self.recipe.out, self._split_stage(name, options), self._split_key(options))

    def split(self, name: str, options: SplitOptions) -> None:
        stage = self._split_stage(name, options)
        work = partial(split, self.dense, self.recipe.out / name, options, overwrite=True, announce=self.lines.announce)
        self._once(stage, self._split_key(options), work)

    def finetune(self, name: str) -> None:
        """Train one of the splits against the dense model."""
        stage, student = self._finetune_stage(name), self.recipe.out / name
        assert stage.folder is not None
        options = self.recipe.finetune
        work = partial(finetune, str(student), self.dense, stage.folder, options, overwrite=True)
        self._once(stage, self._finetune_key(name), work)

    def compare(self) -> None:
        """Published methods; a comparison keeps its own results in the cache."""
        section, stage = self.recipe.compare, self._compare_stage
        assert section is not None
        # Budgets say how much is active.
        options = replace(self.recipe.split, active=None, shared=None, budget=None)
        markers.begin(self.recipe.out, stage, "")
        with self.lines.stage(COMPARE) as track:
            compare(
                self.dense,
                section.budget,
                section.data,
                options,
                tokens=section.data_tokens,
                tasks=section.tasks,
                questions=section.questions,
                only=section.method,
                out=stage.result,
                track=track,
            )
        markers.finish(self.recipe.out, stage, "")

    def verify(self) -> VerifyReport:
        """Of the main split."""
        tolerance = self.recipe.limits.max_logit_difference or TOLERANCE
        with self.lines.stage(VERIFY) as track:
            return verify(self.recipe.out / MAIN, self.dense, tolerance=tolerance, track=track)

    def evaluate(self, names: Sequence[str]) -> Evaluation:
        """Of the dense model and of the named folders."""
        models = [self.recipe.model, *(str(self.recipe.out / name) for name in names)]
        assert self.recipe.eval is not None
        with self.lines.stage(EVAL) as track:
            return measure(models, self.recipe.eval, track=track)

    def bench(self) -> ModelBench:
        """The main split beside the dense model and the pruned controls."""
        recipe, options, (main, *others) = self.recipe, self.recipe.bench, self._judged
        assert options is not None
        records = (Path(folder) / RECORD_FILE for folder in (main, *others))
        key = digest(self.source, *records, options, *map(Path, (*options.data, *options.tasks)))
        work = partial(bench, [main], [recipe.model, *others], options, out=recipe.out, overwrite=True)
        self._once(self._bench_stage, key, work)
        return load_bench(recipe.out)

    def _once(self, stage: Stage, key: str, work: Callable[..., Any]) -> None:
        """Do a stage unless it is done.

        Args:
            stage: what it makes.
            key: digest of its inputs.
            work: makes it; takes what draws its bars.
        """
        if markers.is_done(self.recipe.out, stage, key):
            self.skipped.append(stage.name)
            self.lines.skip(stage.name)
            return
        resumed = markers.begin(self.recipe.out, stage, key)
        began = time.perf_counter()
        with self.lines.stage(stage.name) as track:
            work(track=track)
        markers.finish(self.recipe.out, stage, key, None if resumed else time.perf_counter() - began)

    def _split_stage(self, name: str, options: SplitOptions) -> Stage:
        given = {key: value for key, value in asdict(options).items() if key not in SETTLED}
        return self._folder_stage(name, {"model": self.source, "options": given})

    def _split_key(self, options: SplitOptions) -> str:
        return digest(self.source, options, *map(Path, options.calibration))

    def _finetune_stage(self, name: str) -> Stage:
        options = self.recipe.finetune
        assert options is not None
        counted = ("tokens",) if options.minutes is not None else ()
        given = {key: value for key, value in asdict(options).items() if key not in (*SETTLED, *counted)}
        return self._folder_stage(name + TRAINED, {"teacher": self.source, "options": given})

    def _finetune_key(self, name: str) -> str:
        options = self.recipe.finetune
        assert options is not None
        student = self.recipe.out / name / RECORD_FILE
        return digest(self.source, student, options, *map(Path, (*options.data, *options.eval_data)))

    def _folder_stage(self, name: str, job: Mapping[str, Any]) -> Stage:
        folder = self.recipe.out / name
        return Stage(name, folder / RECORD_FILE, folder, {"job": job})

    @property
    def _compare_stage(self) -> Stage:
        return Stage(COMPARE, self.recipe.out / f"{COMPARE}.json", None, {"model": self.dense.name})

    @property
    def _bench_stage(self) -> Stage:
        out, options, (main, *others) = self.recipe.out, self.recipe.bench or BenchOptions(), self._judged
        command = command_line("bench", main, options, against=[self.recipe.model, *others], out=out, overwrite=True)
        return Stage(BENCH, out / BENCH_FILE, None, {"command": command})

    @property
    def _judged(self) -> list[str]:
        """The folders that are benchmarked: of the main split, and of the controls that are pruned."""
        static = [name for name, options in all_splits(self.recipe).items() if options.static]
        return [judged(self.recipe, name) for name in (MAIN, *static)]


def all_splits(recipe: Recipe) -> dict[str, SplitOptions]:
    """All that are made, by folder."""
    controls = {name: control_options(recipe, name, control) for name, control in recipe.controls.items()}
    return {MAIN: recipe.split, **controls}
