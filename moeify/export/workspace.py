"""OUT.partial: where a split is built, so that OUT appears whole or not at all and a killed run can go on.

    OUT.partial/job.json               what is being made; a run that would make something else is refused
    OUT.partial/work/layer-00000...    finished layers: labels, router, refit columns
    OUT.partial/model-00001-of-...     finished shards

Every file is written by `moeify.cache.replacing`, so that a file with its final name is complete.
"""

import glob
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeify import cache
from moeify.cache import disk_errors, intact, replacing
from moeify.errors import InputError
from moeify.plan import PLAN_FILE, LayerPlan, SplitPlan

RECORD_FILE = "moeify.json"
# Written last: a folder that has it has everything.
LAST_FILE = "README.md"


class Workspace:
    """The folder a checkpoint is built in. Use as a context manager: it holds a lock while open."""

    def __init__(self, out: Path, job: Mapping[str, Any], *, overwrite: bool) -> None:
        # `.` has no name of its own.
        self.out = out = out.resolve()
        self.path = out.with_name(out.name + ".partial")
        self.job = json.loads(json.dumps(job))
        self._overwrite = overwrite
        self._lock = FileLock(str(out.with_name("." + out.name + ".lock")))

    def __enter__(self) -> "Workspace":
        with disk_errors(self.path):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise InputError(f"another run is writing {self.out}", "wait for it or choose another -o") from error
            try:
                self._open()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _open(self) -> None:
        check_replaceable(self.out, overwrite=self._overwrite)
        if self.path.exists() and any(self.path.iterdir()):
            differs = _differences(self._earlier_job(), self.job)
            if differs and not self._overwrite:
                raise InputError(
                    f"{self.path} holds an unfinished run that differs in: {', '.join(differs)}",
                    "--overwrite discards it; the command that began it would resume it",
                )
            if differs:
                shutil.rmtree(self.path)
        (self.path / "work").mkdir(parents=True, exist_ok=True)
        # `replacing` ends its names in .tmp; safetensors begins its own with it, before it renames them to those.
        for leftover in (*self.path.rglob("*.tmp"), *self.path.rglob(".tmp*")):
            leftover.unlink()
        self.write_text("job.json", json.dumps(self.job, indent=1, sort_keys=True))

    def _earlier_job(self) -> dict[str, Any]:
        """The job of the run that left this folder.

        Raises:
            InputError: the folder holds something else.
        """
        if (self.path / "job.json").is_file():
            return dict(json.loads((self.path / "job.json").read_text()))
        if (self.path / RECORD_FILE).is_file():
            # Killed while the folder was being given its final name.
            return dict(json.loads((self.path / RECORD_FILE).read_text())["job"])
        if all(path.name == "work" or path.match("job.json.*.tmp") for path in self.path.iterdir()):
            # Killed before it could say what it was making.
            return dict(self.job)
        raise InputError(f"{self.path} is in the way and was not made by moeify", "move it or choose another -o")

    @property
    def is_complete(self) -> bool:
        """Everything is written and only the final name is missing."""
        return self.has(LAST_FILE)

    def _release(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def write_text(self, name: str, text: str) -> None:
        with replacing(self.path / name) as temporary:
            temporary.write_text(text)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file; the name may have folders before it."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path / name) as temporary:
            shutil.copyfile(source, temporary)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file; the name may have folders before it."""
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(content)

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with replacing(self.path / name) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def write_plan(self, plan: SplitPlan) -> None:
        with replacing(self.path / PLAN_FILE) as temporary:
            plan.save(temporary)

    def save_layer(self, plan: LayerPlan) -> None:
        diagnostics = json.dumps(dict(plan.diagnostics))
        self.write_tensors(_layer_file(plan.layer), plan.tensors(), {"diagnostics": diagnostics})

    def load_layer(self, layer: int) -> LayerPlan | None:
        """A layer that an earlier run finished; None where there is none, or none that can be read."""

        def read(file: Path) -> LayerPlan:
            with safe_open(file, framework="pt") as reader:
                diagnostics = json.loads((reader.metadata() or {})["diagnostics"])
                return replace(LayerPlan.read(reader, layer), diagnostics=diagnostics)

        return intact(self.path / _layer_file(layer), read)

    def commit(self) -> None:
        """Drop the work files and give the folder its final name; a former OUT goes only after that."""
        shutil.rmtree(self.path / "work", ignore_errors=True)
        (self.path / "job.json").unlink(missing_ok=True)
        with disk_errors(self.path):
            if self.out.exists():
                # A name that nothing of the user's can have.
                self.out.rename(self.out.with_name(f"{self.out.name}.replaced-{uuid.uuid4().hex}"))
            self.path.rename(self.out)
            cache.sync(self.out.parent)
        for former in self.out.parent.glob(f"{glob.escape(self.out.name)}.replaced-{'[0-9a-f]' * 32}"):
            shutil.rmtree(former, ignore_errors=True)


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that exists, and never replace a folder that moeify did not write.

    Raises:
        InputError: OUT exists and may not be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{out} exists", "--overwrite replaces it once the new one is complete")
    if not ((out / PLAN_FILE).is_file() and (out / RECORD_FILE).is_file()) and not _has_record(out):
        raise InputError(f"{out} was not written by moeify, so it is not replaced", "choose another -o")


def _has_record(out: Path) -> bool:
    """A fine-tuned dense model has a record and no plan."""
    schema = intact(out / RECORD_FILE, lambda file: json.loads(file.read_text())["schema"])
    return str(schema).startswith("moeify.record/")


def _differences(earlier: Any, now: Any, prefix: str = "") -> list[str]:
    """Names of the values that differ between two jobs, nested ones with a dot."""
    if not (isinstance(earlier, dict) and isinstance(now, dict)):
        return [] if earlier == now else [prefix]
    return [
        name
        for key in sorted({*earlier, *now})
        for name in _differences(earlier.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
    ]


def _layer_file(layer: int) -> str:
    return f"work/layer-{layer:05d}.safetensors"
