"""What goes wrong in a split is said with a hint, destroys nothing, and the same command goes on where it stopped."""

import errno
import hashlib
import importlib
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeDense

from moeify import cache
from moeify.convert.pipeline import split
from moeify.convert.preview import preview
from moeify.errors import DiskError, InputError, MoeifyError, UsageError
from moeify.export import workspace, writer
from moeify.options import SplitOptions

# The package binds the name to the function.
split_module = importlib.import_module("moeify.convert.pipeline")

LAYERS, SHARD_BYTES = 3, 40_000
SIZES: dict[str, Any] = {"num_hidden_layers": LAYERS, "intermediate_size": 128, "max_position_embeddings": 64}

Run = Callable[..., Path]


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def dense(make_dense: MakeDense) -> Path:
    return make_dense("llama", **SIZES)


@pytest.fixture(autouse=True)
def _several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def run(dense: Path, calibration_file: Path) -> Run:
    """run(out, **options): a small split."""

    def convert(out: Path, *, overwrite: bool = False, **changed: Any) -> Path:
        options = {"calibration": (str(calibration_file),), "tokens": 1024, **changed}
        return split(str(dense), out, SplitOptions(**options), overwrite=overwrite).out

    return convert


@pytest.fixture
def reference(run: Run, tmp_path: Path) -> dict[str, str]:
    """What an uninterrupted split leaves."""
    return tree(run(tmp_path / "reference"))


def refusal(run: Run, out: Path, pattern: str, kind: type[MoeifyError] = InputError, **changed: Any) -> MoeifyError:
    """The error of a split that must leave the folder around OUT as it was."""
    before = tree(out.parent)
    with pytest.raises(MoeifyError, match=pattern) as caught:
        run(out, **changed)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert tree(out.parent) == before
    assert not out.with_name(f"{out.name}.partial").exists()
    return caught.value


def test_an_existing_result_is_refused_before_anything_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(tmp_path / "out")
    monkeypatch.setattr(split_module, "calibration_inputs", lambda _: pytest.fail("text was read"))
    error = refusal(run, out, "exists")
    assert "--overwrite" in error.hint


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_model_itself_is_never_the_result(
    dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    before = tree(dense)
    (tmp_path / "link").symlink_to(dense)
    monkeypatch.chdir(dense.parent)
    for out in (dense, tmp_path / "link", Path(dense.name), dense / ".." / dense.name):
        with pytest.raises(UsageError, match="one of the models themselves"):
            run(out, overwrite=overwrite)
    assert tree(dense) == before


def test_a_folder_that_moeify_did_not_write_is_never_replaced(dense: Path, run: Run, tmp_path: Path) -> None:
    other = Path(shutil.copytree(dense, tmp_path / "other"))
    refusal(run, other, "not written by moeify", overwrite=True)


@pytest.mark.parametrize("stage", ["layers", "shards", "commit"])
def test_overwrite_keeps_the_old_result_until_the_new_one_is_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    out = run(tmp_path / "out", experts=4)
    before = tree(out)
    with monkeypatch.context() as patch:
        place = {
            "layers": (split_module, "fit_layer"),
            "shards": (writer.MoEWriter, "layer"),
            "commit": (workspace.Workspace, "commit"),
        }[stage]
        patch.setattr(*place, lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(out, overwrite=True)
    assert tree(out) == before
    run(out, overwrite=True)
    assert tree(out) == tree(run(tmp_path / "fresh"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}


def test_an_unfinished_split_of_other_options_is_refused_by_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(workspace.Workspace, "commit", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(out)
    before = tree(partial)
    for changed, key in (({"seed": 5}, "seed"), ({"experts": 4}, "experts"), ({"dtype": "bfloat16"}, "dtype")):
        with pytest.raises(InputError, match=rf"differs in: .*{key}") as caught:
            run(out, **changed)
        assert "--overwrite" in caught.value.hint
        assert tree(partial) == before
    run(out, experts=4, overwrite=True)
    assert tree(out) == tree(run(tmp_path / "fresh", experts=4))
    assert not partial.exists()


def test_two_runs_exclude_each_other(run: Run, tmp_path: Path, reference: dict[str, str]) -> None:
    out = tmp_path / "out"
    with workspace.Workspace(out, {}, overwrite=False), pytest.raises(InputError, match="another run is writing"):
        run(out)
    shutil.rmtree(tmp_path / "out.partial")
    assert tree(run(out)) == reference


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"experts": 7}, "128 neurons do not divide into 7 experts"),
        ({"experts": 1000}, "128 neurons do not divide into 1000 experts"),
        ({"context": 65}, "context 65 does not fit"),
        ({"context": 8}, "context 8 does not fit"),
        ({"tokens": 1000}, "1,000 calibration tokens are too few"),
        ({"tokens": 0}, "0 calibration tokens are too few"),
        ({"tokens": 10**7}, "tokens, .* were asked for"),
        ({"plan": "/no/such/plan"}, "no split plan at"),
        ({"target": "qwen3_moe"}, "qwen3_moe does not represent this model exactly: its attention always"),
        ({"target": "mixtral", "shared": 2}, "mixtral does not represent this model exactly: has no shared experts"),
        ({"active": 4, "shared": 4}, "nothing is routed"),
        ({"calibration": ("/no/such/text",)}, "there is no text source"),
    ],
)
def test_what_this_model_cannot_do_is_refused(run: Run, tmp_path: Path, changed: dict[str, Any], pattern: str) -> None:
    refusal(run, tmp_path / "out", pattern, **changed)


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"experts": 1}, "--experts 1 is out of range"),
        ({"experts": 0}, "--experts 0 is out of range"),
        ({"experts": -4}, "--experts -4 is out of range"),
        ({"experts": 8, "active": 9}, "9 active of 8 experts is impossible"),
        ({"active": 0}, "--active 0 is out of range"),
        ({"active": 2, "shared": 3}, "3 shared of 2 active experts is impossible"),
        ({"shared": -1}, "--shared -1 is out of range"),
        ({"partition": "nothing"}, "'nothing' is not a partition"),
        ({"partition": "_balanced"}, "'_balanced' is not a partition"),
        ({"router": "nothing"}, "'nothing' is not a router"),
        ({"target": "nothing"}, "'nothing' is not a target"),
        ({"target": "llama"}, "'llama' is not a target"),
        ({"static": True, "shared": 2}, "--static"),
        ({"static": True, "target": "mixtral"}, "--static"),
        ({"static": True, "plan": "plan"}, "--static and --plan"),
        ({"calibration": ("builtin", "builtin")}, "named 2 times"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"device": "nothing"}, "nothing"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_what_no_model_can_do_is_a_usage_error(run: Run, tmp_path: Path, changed: dict[str, Any], pattern: str) -> None:
    refusal(run, tmp_path / "out", pattern, UsageError, **changed)


def test_the_hint_names_expert_counts_that_work(dense: Path, run: Run, tmp_path: Path) -> None:
    error = refusal(run, tmp_path / "out", "do not divide", experts=7)
    counts = [int(word) for word in error.hint.replace(",", "").split() if word.isdigit()]
    # Slices of two neurons or one divide as well, but no stock kernel runs them.
    assert counts == [2, 4, 8, 16, 32]
    for count in counts:
        preview(str(dense), SplitOptions(experts=count))


@pytest.mark.parametrize("content", [b"\x00\x01\x02" * 999, "Gr\u00fc\u00dfe".encode("latin-1") * 999, b"", b"\n \n"])
def test_calibration_that_is_not_text(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    refusal(run, tmp_path / "out", "text.txt", calibration=(str(tmp_path / "text.txt"),))


def test_calibration_that_is_too_short_says_what_works(run: Run, tmp_path: Path, calibration_file: Path) -> None:
    (tmp_path / "text.txt").write_text(calibration_file.read_text()[:6000])
    source = (str(tmp_path / "text.txt"),)
    error = refusal(run, tmp_path / "out", "were asked for", calibration=source, tokens=16384)
    _, tokens = error.hint.split()
    run(tmp_path / "out", calibration=source, tokens=int(tokens))


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"num_hidden_layers": LAYERS + 1}, "layers"),
        ({"intermediate_size": 64}, "neurons"),
        ({"hidden_size": 48}, "hidden"),
    ],
)
def test_a_plan_of_another_model(
    make_dense: MakeDense,
    run: Run,
    tmp_path: Path,
    calibration_file: Path,
    other: dict[str, Any],
    what: str,
    refit: bool,
) -> None:
    options = SplitOptions(calibration=(str(calibration_file),), tokens=1024)
    split(str(make_dense("llama", **{**SIZES, **other})), tmp_path / "other", options)
    refusal(run, tmp_path / "out", what, plan=str(tmp_path / "other"), refit=refit)


@pytest.mark.parametrize("damage", ["truncated", "not a plan", "weights"])
def test_a_plan_that_is_none(dense: Path, run: Run, tmp_path: Path, damage: str) -> None:
    plan = run(tmp_path / "first") / "split_plan.safetensors"
    if damage == "truncated":
        plan.write_bytes(plan.read_bytes()[:-10])
    elif damage == "not a plan":
        plan.write_text("labels: all shared")
    else:
        shutil.copy(dense / "model.safetensors", plan)
    refusal(run, tmp_path / "out", "split_plan.safetensors", plan=str(plan))


@pytest.mark.parametrize("weight", ["down_proj", "up_proj"])
def test_a_layer_that_does_nothing_is_converted(
    make_dense: MakeDense, tmp_path: Path, calibration_file: Path, weight: str
) -> None:
    """Models grown by identity blocks have them (LLaMA Pro, https://arxiv.org/abs/2401.02415)."""
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.1.mlp.{weight}.weight"].zero_()
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = split(str(model), tmp_path / "out", SplitOptions(calibration=(str(calibration_file),), tokens=1024))
    assert all(math.isfinite(value) for value in result.plan.layers[1].diagnostics.values())


@pytest.mark.parametrize("weight", ["self_attn.o_proj", "mlp.down_proj", "mlp.gate_proj"])
def test_weights_that_the_new_type_cannot_hold(
    make_dense: MakeDense, tmp_path: Path, calibration_file: Path, weight: str
) -> None:
    """bf16 reaches 1e38, fp16 65,504: what would become infinite must not be written."""
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(make_dense("llama"), tmp_path / "dense"))
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.layers.1.{weight}.weight"][0, 0] = 1e6
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = SplitOptions(calibration=(str(calibration_file),), tokens=1024, dtype="float16")
    with pytest.raises(InputError, match=rf"{weight}.* beyond the range of float16"):
        split(str(model), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def count_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many files a split writes."""
    number = 0

    def count(path: Path) -> None:
        nonlocal number
        number += path.is_file()

    with monkeypatch.context() as patch:
        patch.setattr(cache, "sync", count)
        run(tmp_path / "counted")
    return number


def test_a_disk_that_is_full_at_any_file(
    run: Run, tmp_path: Path, reference: dict[str, str], count_files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has room for so many files and no more; then there is room, and the same command finishes."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    really_sync = cache.sync
    room = 0

    def sync(path: Path) -> None:
        nonlocal room
        if path.is_file():
            if room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= 1
        really_sync(path)

    monkeypatch.setattr(cache, "sync", sync)
    finished = set()
    for files in range(count_files):
        room = files
        with pytest.raises(InputError, match="is full") as caught:
            run(out)
        assert "same command again" in caught.value.hint
        assert not out.exists()
        finished.add(len([file for file in tree(partial) if file.endswith(".safetensors")]))
        room = count_files
        run(out)
        assert tree(out) == reference
        shutil.rmtree(out)
    # Each layer and each shard was once the last file that had room.
    shards = [file for file in reference if file.startswith("model-")]
    assert len(shards) >= 3
    assert finished >= set(range(LAYERS + len(shards) + 1))


def test_a_disk_that_is_full_at_the_tokenizer(
    run: Run, tmp_path: Path, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied, and not written, meets a full disk as well."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(InputError, match=r"is full|No space left"):
            run(tmp_path / "out")
    assert tree(run(tmp_path / "out")) == reference


@pytest.fixture
def mount() -> Iterator[Callable[[Path, str], None]]:
    """mount(folder, options) of a disk in memory; needs root."""
    mounted: list[Path] = []

    def make(folder: Path, options: str) -> None:
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a file system here")
        mounted.append(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(
    run: Run,
    tmp_path: Path,
    reference: dict[str, str],
    mount: Callable[[Path, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small file system with less and less ballast on it: the same command stops later each time and then ends."""
    # Others may fill it after the beginning.
    monkeypatch.setattr(split_module, "check_room", lambda *_: None)
    disk = tmp_path / "disk"
    mount(disk, "size=1m")
    partial, ballast = disk / "out.partial", disk / "ballast"
    stops: list[set[str]] = []
    errors: list[str] = []
    for free in range(0, 1_000_000, 12_000):
        ballast.unlink(missing_ok=True)
        held = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.exists() else 0
        with ballast.open("wb") as file:
            file.write(bytes(max(0, 1024 * 1024 - held - free)))
        try:
            run(disk / "out")
        except InputError as error:
            errors.append(f"{error} {error.hint}")
        else:
            break
        assert not (disk / "out").exists()
        stops.append(set(tree(partial)) if partial.exists() else set())
    assert tree(disk / "out") == reference
    assert {path.name for path in disk.iterdir()} == {"ballast", "out"}
    assert all("is full" in error and "same command again" in error for error in errors)
    # It did stop before a layer, between layers and between shards.
    layers = {sum("layer-" in file and not file.endswith(".tmp") for file in stop) for stop in stops}
    shards = {sum("model-" in file and not file.endswith(".tmp") for file in stop) for stop in stops}
    assert min(layers) == 0
    assert max(layers) == LAYERS
    assert len(shards) > 1


def test_a_disk_that_cannot_be_written(run: Run, tmp_path: Path, mount: Callable[[Path, str], None]) -> None:
    disk = tmp_path / "disk"
    mount(disk, "size=1m,ro")
    for out in (disk / "out", disk / "deep" / "out"):
        refusal(run, out, "cannot write", DiskError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    refusal(run, folder / "out", "cannot write", DiskError)
