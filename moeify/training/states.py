"""Checkpoints of a training: what is saved, how it is checked, and how a run goes on from it.

They hold what is trained under the names it has in memory, not a model folder: stock folders keep experts under other
names, which the Trainer would skip without a word when it resumes. Sharded (FSDP) states are accelerate's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from moeify.errors import CheckError, InputError, MoeifyError
from moeify.training.model import Student
from moeify.words import printable

STATE_FILE = "trained.safetensors"
# Its presence says that everything else in a checkpoint folder was written.
COMPLETE_FILE = "complete"


class StateTrainer(Trainer):
    """transformers' Trainer, but for what a checkpoint holds."""

    # The model, prepared for its stage.
    _student: Student

    def _kept(self) -> str:
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        return f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"

    def trained_state(self) -> dict[str, Tensor]:
        """What was trained, whole and on the CPU; on the main process only where it had to be gathered."""
        if not self.is_fsdp_enabled:
            return {name: tensor.cpu().contiguous() for name, tensor in self._student.trained_state().items()}
        names = set(self._student.trained_state())
        whole = self.accelerator.get_state_dict(self.model)
        return {name: tensor.cpu().contiguous() for name, tensor in whole.items() if name in names}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        bad = next((n for n, p in model.named_parameters() if p.requires_grad and not _finite(p)), None)
        if bad is not None:
            step, kept = self.state.global_step, self._kept()
            raise CheckError(
                f"{bad.removeprefix('module.')} has NaN or infinite values after step {step}; {kept}",
                "--learning-rate and --router-rate take less; --overwrite starts anew with them",
            )
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = self._student.trained_state() if state_dict is None else state_dict
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(Path(resume_from_checkpoint)):
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                self._student.load_state(load_file(Path(resume_from_checkpoint) / STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(Path(checkpoint)):
                if not self.is_fsdp_enabled:
                    # The Trainer would begin with a new optimizer, and not say so.
                    (Path(checkpoint) / OPTIMIZER_NAME).stat()
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(Path(checkpoint)):
                super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint), self.model_wrapped)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn what a damaged or foreign checkpoint raises into an error with a hint; its pickles run nothing.

    Raises:
        InputError: it cannot be read.
    """
    try:
        yield
    except Exception as error:
        # Its readers raise whatever they stumble over; ours have said all that there is to say.
        if isinstance(error, MoeifyError):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"the training state {checkpoint} cannot be read: {printable(first)}",
            "remove that folder: the same command goes on from the one before it, or starts the stage anew",
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage that was written to its end."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", maxsplit=1)[1])


def _finite(parameter: Tensor) -> bool:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return bool(local.detach().isfinite().all())
