"""What the stages of a recipe will take: times, memory and disk, before one is begun.

Times rest on the rate of a matrix product that is measured here; everything else is arithmetic. They are meant to tell
a minute from an hour. The quickstart was said to take 64 s and took 85 s, a recipe of SmolLM2-135M 117 s and 301 s, of
which it had the processor for 128 s (2 shared cores of an Intel Xeon, 2026-11-26).
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from moeify.benchmark.machine import device_by_name
from moeify.benchmark.models.inputs import PROMPTS
from moeify.check.methods import methods
from moeify.check.tasks_local import SUFFIXES, open_questions
from moeify.convert.estimate import TIME_FACTOR, forward_flops, matmul_rate, process_bytes
from moeify.convert.preview import Preview
from moeify.errors import UsageError, warn
from moeify.models.dense import DenseModel
from moeify.models.heads import LANGUAGE_MODELS, auto_name
from moeify.recipes.model import Recipe
from moeify.recipes.names import BENCH, COMPARE, DENSE, MAIN, TRAINED

# Bytes a second that a checkpoint is read with, and seconds that a process needs to import its libraries.
READ_RATE = 1e9
IMPORT_S = 5.0
# Of a forward pass: one of the teacher, one of the student, two backwards.
TRAINING_FACTOR = 4.0
# Fitting single layers: hidden states of teacher and student, and steps on the FFNs alone.
LAYERS_FACTOR = 6.0
# Evaluations during a stage of training, and before and after it.
EVALUATIONS = 12
# Weights, gradients and two moments in float32.
TRAINED_BYTES = 16
# Implementations of experts that a benchmark tries, and what it does beside a row's own seconds: warming up, filling
# caches, waiting for the slowest.
IMPLEMENTATIONS = 4
ROW_FACTOR = 1.5
# What experts do is found with the outputs of all of them.
EXPERTS_FACTOR = 3.0
PHASES = 2
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class StagePreview:
    """A stage that is not begun.

    Args:
        name: of the stage, and of the folder that it makes, if it makes one.
        what: it does, in words.
        duration_s: about, on this machine; NaN if its device is not here.
        disk_bytes: of what it leaves.
        peak_memory_bytes: about; on a GPU of what lies there.
        finished: its result is there already, so that it takes nothing.
    """

    name: str
    what: str
    duration_s: float = 0.0
    disk_bytes: int = 0
    peak_memory_bytes: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Estimates:
    """Estimates of all stages of one recipe.

    Args:
        recipe: what is to be run.
        dense: its model.
        splits: what each split would be, by folder.
        finished: folders that are there.
    """

    recipe: Recipe
    dense: DenseModel
    splits: Mapping[str, Preview]
    finished: Sequence[str]
    _rates: dict[str, float] = field(default_factory=dict)

    def stages(self) -> list[StagePreview]:
        """In the order in which they run."""
        recipe = self.recipe
        stages = [self._split(name, preview) for name, preview in self.splits.items()]
        stages += [self._finetune(name) for name in recipe.trained]
        optional = {COMPARE: self._compare, "verify": self._verify, "eval": self._eval, BENCH: self._bench}
        return stages + [make() for name, make in optional.items() if getattr(recipe, name)]

    @cached_property
    def _dense_bytes(self) -> int:
        return self.dense.num_parameters * self.dense.dtype.itemsize

    @cached_property
    def _models(self) -> dict[str, int]:
        """Bytes of every model that is evaluated, by name, the dense one first."""
        sizes = {name: preview.estimate.checkpoint_bytes for name, preview in self.splits.items()}
        trained = {name + TRAINED: sizes[name] for name in self.recipe.trained}
        return {DENSE: self._dense_bytes, **sizes, **trained}

    def _forward(self, tokens: float, device: str) -> float:
        """Seconds of the dense model's forward pass; NaN on a device that is not here."""
        if device not in self._rates:
            try:
                self._rates[device] = matmul_rate(str(device_by_name(device)))
            except UsageError:
                warn(f"there is no {device} here, so the times of what runs there are not known")
                self._rates[device] = math.nan
        return forward_flops(self.dense, 1) * tokens / self._rates[device]

    def _load(self) -> float:
        return sum(self._models.values()) / READ_RATE

    def _context(self, chosen: int | None) -> int:
        # Of images and sound there are no windows, whose length would matter.
        return chosen or min(512, self.dense.family.context_of(self.dense.text_config) or 512)

    def _split(self, name: str, preview: Preview) -> StagePreview:
        layout, estimate = preview.layout, preview.estimate
        what = (
            f"{layout.num_active} of {layout.num_experts} slices kept, dense"
            if layout.is_static
            else f"{layout.num_active} of {layout.num_experts} experts, {layout.num_shared} shared; {preview.target}"
        )
        if name in self.finished:
            return StagePreview(name, what, finished=True)
        return StagePreview(name, what, estimate.duration_s, estimate.checkpoint_bytes, estimate.peak_memory_bytes)

    def _finetune(self, name: str) -> StagePreview:
        options = self.recipe.finetune
        assert options is not None
        seconds = 0.0
        for stage in options.stage:
            if stage == "layers":
                seconds += LAYERS_FACTOR * self._forward(min(options.tokens, options.layer_tokens), options.device)
            else:
                passes = TRAINING_FACTOR + (1 if options.checkpointing else 0)
                seconds += passes * self._forward(options.tokens * options.epochs, options.device)
            # Teacher and student.
            measured = 2 * options.eval_tokens * len(options.eval_data) * EVALUATIONS
            seconds += self._forward(measured, options.device)
        parameters = self.splits[name].num_parameters
        what = f"{', '.join(options.stage)} on {options.tokens * options.epochs:,} tokens"
        size = self.splits[name].estimate.checkpoint_bytes
        memory = process_bytes() + parameters * TRAINED_BYTES + self._dense_bytes
        return StagePreview(name + TRAINED, what, seconds, size, memory)

    def _compare(self) -> StagePreview:
        section, split = self.recipe.compare, self.recipe.split
        assert section is not None
        count = len(section.method) + 1 if section.method else len(methods(split.experts or 8))
        tokens = TIME_FACTOR * split.tokens + section.data_tokens * len(section.data)
        tokens += self._question_tokens(section.tasks, section.questions)
        seconds = count * len(section.budget) * self._forward(tokens, split.device)
        what = f"{count} methods at {len(section.budget)} budget{'s' if len(section.budget) > 1 else ''}"
        memory = max(preview.estimate.peak_memory_bytes for preview in self.splits.values())
        return StagePreview(COMPARE, what, seconds, peak_memory_bytes=memory)

    def _verify(self) -> StagePreview:
        parameters = self.dense.num_parameters
        # Dense and converted model in float32, the latter twice.
        seconds = 3 * 4 * parameters / READ_RATE
        what, memory = "every expert on equals the dense model", process_bytes() + 8 * parameters
        return StagePreview("verify", what, seconds, peak_memory_bytes=memory)

    def _eval(self) -> StagePreview:
        options = self.recipe.eval
        assert options is not None
        context = self._context(options.context)
        again = context / (options.stride or context / 2)
        tokens = options.tokens * len(options.data) * again + self._question_tokens(options.tasks, options.questions)
        seconds = self._load() + len(self._models) * self._forward(tokens, options.device)
        texts = f"{len(options.data)} text{'s' if len(options.data) > 1 else ''}"
        tasks = f", {len(options.tasks)} task{'s' if len(options.tasks) > 1 else ''}" if options.tasks else ""
        what = f"{len(self._models)} models on {texts}{tasks}"
        return StagePreview("eval", what, seconds, peak_memory_bytes=process_bytes() + max(self._models.values()))

    def _bench(self) -> StagePreview:
        options, static = self.recipe.bench, [name for name, one in self.splits.items() if one.layout.is_static]
        assert options is not None
        num_models = 2 + len(static)
        writes = auto_name(self.dense.config) in LANGUAGE_MODELS
        # An encoder has one phase, and one length where nobody says.
        rows = (num_models - 1 + (len(options.implementation) or IMPLEMENTATIONS)) * (PHASES if writes else 1)
        regimes = len(options.batch) * (len(options.prompt) or (len(PROMPTS) if writes else 1))
        seconds = 0.0
        if "speed" not in options.skip:
            seconds += rows * regimes * options.seconds_per_row * ROW_FACTOR
        if "memory" not in options.skip:
            # Once loaded, and once run.
            seconds += 2 * num_models * IMPORT_S
        passes = num_models * ("quality" not in options.skip) + EXPERTS_FACTOR * ("experts" not in options.skip)
        seconds += passes * self._forward(options.tokens * len(options.data), options.device)
        seconds += num_models * self._forward(self._question_tokens(options.tasks, options.questions), options.device)
        what = f"{num_models} models, {regimes} regime{'s' if regimes > 1 else ''}; {', '.join(options.engine)}"
        # All of them at once.
        judged = sum(self._models[name] for name in (DENSE, MAIN, *static))
        return StagePreview(BENCH, what, seconds, peak_memory_bytes=process_bytes() + judged)

    def _question_tokens(self, tasks: Sequence[str], limit: int | None) -> float:
        """Of files of questions; how long those of lm-eval are is known when they are fetched."""
        files = [Path(task) for task in tasks if Path(task).suffix in SUFFIXES]
        pairs = [pair for file in files for pair in open_questions(file, limit).pairs]
        return sum(len(text) + len(choice) for text, choice in pairs) / CHARACTERS_PER_TOKEN


def free_bytes(folder: Path) -> int:
    """Free on the disk where a folder is, or will be."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free
