"""OUT.partial: where a split is built, so that OUT appears whole or not at all and a killed run can go on.

    OUT.partial/job.json               what is being made; a run that would make something else is refused
    OUT.partial/work/layer-00000...    finished layers: labels, router, refit columns
    OUT.partial/model-00001-of-...     finished shards

Every file is written by `moeify.cache.replacing`, so that a file with its final name is complete.
"""

import glob
import itertools
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeify import cache
from moeify.cache import disk_errors, intact, made_folders, replacing
from moeify.errors import DiskError, InputError, MoeifyError, UsageError
from moeify.export.record import (
    LAST_FILE,
    PATTERNS,
    RECORD_FILE,
    check_replaceable,
    read_record,
    record_text,
    strangers,
)
from moeify.plan import PLAN_FILE, LayerPlan, SplitPlan
from moeify.words import size

NAMES_FILE = "work/names"
# Files that say how the work is done.
NO_RESULTS = ("job.json", "names", "hidden-states")


class Workspace:
    """The folder a checkpoint is built in. Use as a context manager: it holds a lock while open.

    A refusal (InputError, UsageError) leaves nothing that this run began; an interruption, a kill or a DiskError keeps
    what is finished for the next run.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], *, overwrite: bool) -> None:
        # `.` has no name of its own.
        self.out = out = out.resolve()
        self.path = out.with_name(out.name + ".partial")
        self.job = json.loads(json.dumps(job))
        self._overwrite = overwrite
        self._lock = FileLock(str(out.with_name("." + out.name + ".lock")))
        self._began_here = False
        self._files: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> "Workspace":
        with ExitStack() as stack:
            stack.enter_context(disk_errors(self.path))
            stack.enter_context(made_folders(self.out.parent))
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise InputError(f"another run is writing {self.out}", "wait for it or choose another -o") from error
            stack.callback(self._release)
            try:
                self._open()
            except BaseException:
                if self._began_here:
                    self.discard()
                raise
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: Any) -> None:
        refused = kind is not None and issubclass(kind, (InputError, UsageError)) and not issubclass(kind, DiskError)
        if refused and self._began_here:
            self.discard()
        # Compiled code that is interrupted may replace KeyboardInterrupt by an error of its own.
        elif error is not None and not isinstance(error, MoeifyError) and (kept := self._finished_bytes()):
            layers = f"finished layers: {self.num_layers}, " if self.num_layers else ""
            error.add_note(f"kept: {layers}{size(kept)} in {self.path}")
        self._stack.__exit__(kind, error, *trace)

    def _finished_bytes(self) -> int:
        """Of all that an interrupted run leaves to the next one."""
        files = (path for path in self.path.rglob("*") if path.is_file() and path.name not in NO_RESULTS)
        return sum(file.stat().st_size for file in files)

    def discard(self) -> None:
        """Remove all that was built; a file that somebody else put there keeps the folder."""
        if self.path.exists() and self._stranger() is None:
            shutil.rmtree(self.path, ignore_errors=True)

    def check_sources(self, check_unchanged: Callable[[], None]) -> None:
        """Discard all that was built if a model that it was made of changed since it was opened.

        Raises:
            InputError: as `check_unchanged` does.
        """
        try:
            check_unchanged()
        except InputError:
            self.discard()
            raise

    def _open(self) -> None:
        check_replaceable(self.out, overwrite=self._overwrite)
        if link := next((path for path in (self.path, *self.path.rglob("*")) if path.is_symlink()), None):
            # What it leads to is not moeify's to change.
            raise InputError(f"{link} is a link, which moeify did not make", "move it or choose another -o")
        self._began_here = not self.path.exists() or not any(self.path.iterdir())
        if not self._began_here:
            self._take_over()
        (self.path / "work").mkdir(parents=True, exist_ok=True)
        self.write_text("job.json", json.dumps(self.job, indent=1, sort_keys=True))

    def _take_over(self) -> None:
        """Go on from an earlier run, or discard it if it made something else and may be overwritten."""
        differs = _differences(self._earlier_job(), self.job)
        if differs and not self._overwrite:
            raise InputError(
                f"{self.path} holds an unfinished run that differs in: {', '.join(differs)}",
                "--overwrite discards it; the command that began it would resume it",
            )
        # `replacing` ends its names in .tmp; safetensors begins its own with it, before it renames them to those.
        for leftover in (*self.path.rglob("*.tmp"), *self.path.rglob(".tmp*")):
            leftover.unlink()
        names = intact(self.path / NAMES_FILE, Path.read_text) or ""
        record = intact(self.path / RECORD_FILE, read_record) or {}
        self._files = {*names.split("\n"), *record.get("files", ())} - {""}
        if stranger := self._stranger():
            raise InputError(f"{stranger} was not written by moeify", "move it away, or choose another -o")
        if differs:
            shutil.rmtree(self.path)
            self._files.clear()
            self._began_here = True

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

    @property
    def num_bytes(self) -> int:
        """Of the files that are finished, work apart."""
        files = (self.path / name for name in self._files)
        return sum(file.stat().st_size for file in files if file.is_file())

    @property
    def num_layers(self) -> int:
        """Layers that are finished, from the first one on."""
        numbers = itertools.takewhile(lambda layer: self.has(_layer_file(layer)), itertools.count())
        return sum(1 for _ in numbers)

    def _release(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path; what is written to it becomes the file, which belongs to the folder's record."""
        with replacing(self.path / name) as temporary:
            if not _is_work(name) and name not in self._files:
                # First its name: a run that goes on must know its own files from a stranger's.
                with (self.path / NAMES_FILE).open("a") as names:
                    names.write(f"\n{name}")
                self._files.add(name)
            yield temporary

    def write_text(self, name: str, text: str) -> None:
        with self.writing(name) as temporary:
            temporary.write_text(text)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file; the name may have folders before it."""
        with self.writing(name) as temporary:
            shutil.copyfile(source, temporary)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file; the name may have folders before it."""
        with self.writing(name) as temporary:
            temporary.write_bytes(content)

    def write_tensors(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with self.writing(name) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    def write_plan(self, plan: SplitPlan) -> None:
        with self.writing(PLAN_FILE) as temporary:
            plan.save(temporary)

    def write_record(self, numbers: Mapping[str, Any], card: str) -> None:
        """The folder's record, and the model card, after which the folder is complete.

        Args:
            numbers: of parameters.
            card: text of LAST_FILE.

        Raises:
            InputError: there is a file that moeify did not write.
        """
        if stranger := self._stranger():
            raise InputError(f"{stranger} was not written by moeify", "move it away and run the same command again")
        logs = {pattern for pattern in PATTERNS if next(self.path.glob(pattern), None)}
        self.write_text(RECORD_FILE, record_text(self.job, self._files | logs, numbers))
        self.write_text(LAST_FILE, card)

    def _stranger(self) -> Path | None:
        """The first thing in the folder that belongs neither to the result nor to the work."""
        names = strangers(self.path, {*self._files, *PATTERNS})
        return next((self.path / name for name in names if not _is_work(name)), None)

    def decided(self, name: str, decide: Callable[[], str]) -> str:
        """What the run that began here decided, or this one decides now."""
        file = f"work/{name}"
        if not self.has(file):
            self.write_text(file, decide())
        return (self.path / file).read_text()

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
        # All is finished, and stays even if OUT is in the way.
        self._began_here = False
        with disk_errors(self.path):
            # Files may have appeared meanwhile.
            check_replaceable(self.out, overwrite=self._overwrite)
            shutil.rmtree(self.path / "work", ignore_errors=True)
            (self.path / "job.json").unlink(missing_ok=True)
            if self.out.exists():
                # A name that nothing of the user's can have.
                self.out.rename(self.out.with_name(f"{self.out.name}.replaced-{uuid.uuid4().hex}"))
            self.path.rename(self.out)
            cache.sync(self.out.parent)
        for former in self.out.parent.glob(f"{glob.escape(self.out.name)}.replaced-{cache.UNIQUE}"):
            remove_result(former)


def remove_result(folder: Path) -> None:
    """Remove a result that is not needed any more; what appeared in it at the last moment keeps the folder."""
    record = intact(folder / RECORD_FILE, read_record) or {}
    if next(strangers(folder, record.get("files", [])), None) is None:
        shutil.rmtree(folder, ignore_errors=True)


def _is_work(name: str) -> bool:
    """A file or folder that goes at the end."""
    return name in ("job.json", "work") or name.startswith("work/")


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
