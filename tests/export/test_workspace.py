"""OUT appears whole or not at all: nothing is destroyed, nothing unfinished taken for a result, two runs exclude."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify import cache
from moeify.errors import CheckError, DiskError, InputError, MoeifyError, UsageError
from moeify.export.record import LAST_FILE, RECORD_FILE
from moeify.export.workspace import Workspace
from moeify.plan import PLAN_FILE, LayerPlan

JOB = {"model": "abc", "options": {"experts": 8, "calibration": ["a.txt"]}}
LAYER = LayerPlan(
    layer=3,
    labels_F=torch.tensor([-1, 0, 1, -1], dtype=torch.int16),
    router_RD=torch.randn(2, 4, dtype=torch.bfloat16),
    down_DF=torch.randn(4, 4, dtype=torch.bfloat16),
    diagnostics={"error": 0.1234567890123456},
)


FILES = {PLAN_FILE, "weights", RECORD_FILE, LAST_FILE}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def result(folder: Path) -> Path:
    """What moeify would have left at `folder`."""
    finish(folder, "old")
    return folder


def finish(out: Path, content: str, **arguments: Any) -> None:
    with Workspace(out, JOB, **{"overwrite": False, **arguments}) as work:
        for name in (PLAN_FILE, "weights"):
            work.write_text(name, content)
        work.write_record({"parameters": 1}, "card")
        work.commit()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_the_folder_appears_with_its_content_and_nothing_else_stays(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        work.write_text("weights", "new")
        work.save_layer(LAYER)
        assert not out.exists()
        work.commit()
    assert names(out.parent) == {"out", "out/weights"}
    assert (out / "weights").read_text() == "new"


def test_an_unfinished_one_is_resumed(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        assert work.load_layer(3) is None
        work.save_layer(LAYER)
        work.write_text("shard", "1")
        # A killed run leaves these behind.
        (work.path / "shard2.tmp").write_text("half")
        (work.path / "work" / "layer-00004.safetensors.tmp").write_text("half")
    assert not out.exists()
    with Workspace(out, JOB, overwrite=False) as work:
        assert work.has("shard")
        assert not list(work.path.rglob("*.tmp"))
        layer = work.load_layer(3)
        assert layer is not None
        for name in ("labels_F", "router_RD", "down_DF"):
            assert torch.equal(getattr(layer, name), getattr(LAYER, name))
        assert layer.diagnostics == LAYER.diagnostics
        assert work.load_layer(4) is None


def test_a_layer_without_router_and_refit_is_loaded_as_it_was(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        work.save_layer(LayerPlan(0, LAYER.labels_F, None))
        layer = work.load_layer(0)
    assert layer is not None
    assert (layer.router_RD, layer.down_DF, layer.diagnostics) == (None, None, {})


def test_an_unfinished_one_of_other_options_is_refused_by_name(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        work.write_text("shard", "1")
    other = {"model": "abd", "options": {"experts": 4, "calibration": ["a.txt"]}}
    with (
        pytest.raises(InputError, match=r"differs in: model, options") as caught,
        Workspace(out, other, overwrite=False),
    ):
        pass
    assert "--overwrite" in caught.value.hint
    with Workspace(out, JOB, overwrite=False) as work:
        assert work.has("shard")


@pytest.mark.parametrize("other", [{"model": "abc"}, {**JOB, "more": 1}])
def test_a_key_that_only_one_of_them_has_is_a_difference(out: Path, other: dict[str, Any]) -> None:
    with Workspace(out, JOB, overwrite=False):
        pass
    with pytest.raises(InputError, match=r"differs in: (options|more)"), Workspace(out, other, overwrite=False):
        pass


def test_overwrite_discards_an_unfinished_one_of_other_options(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        work.write_text("shard", "1")
    with Workspace(out, {"model": "abd"}, overwrite=True) as work:
        assert not work.has("shard")
        assert json.loads((work.path / "job.json").read_text()) == {"model": "abd"}


def test_overwrite_resumes_an_unfinished_one_of_the_same_options(out: Path) -> None:
    result(out)
    with Workspace(out, JOB, overwrite=True) as work:
        work.write_text("shard", "1")
    with Workspace(out, JOB, overwrite=True) as work:
        assert work.has("shard")


def test_a_strangers_partial_folder_is_left_alone(out: Path) -> None:
    stranger = out.with_name("out.partial")
    stranger.mkdir(parents=True)
    (stranger / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not made by moeify"), Workspace(out, JOB, overwrite=overwrite):
            pass
    assert names(stranger) == {"thesis.txt"}


def test_a_strangers_replaced_folder_is_left_alone(out: Path) -> None:
    """The name under which a former result waits may be taken."""
    result(out)
    stranger = out.with_name("out.replaced")
    stranger.mkdir(parents=True)
    (stranger / "thesis.txt").write_text("years of work")
    try:
        finish(out, "new", overwrite=True)
    except InputError:
        assert (out / "weights").read_text() == "old"
    else:
        assert (out / "weights").read_text() == "new"
    assert names(stranger) == {"thesis.txt"}


def test_an_existing_result_needs_overwrite(out: Path) -> None:
    result(out)
    with pytest.raises(InputError, match="exists") as caught:
        finish(out, "new")
    assert "--overwrite" in caught.value.hint
    assert (out / "weights").read_text() == "old"
    assert names(out.parent) == {"out", *(f"out/{name}" for name in FILES)}


def test_overwrite_replaces_a_result(out: Path) -> None:
    result(out)
    finish(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "new"
    assert names(out.parent) == {"out", *(f"out/{name}" for name in FILES)}


@pytest.mark.parametrize("present", [(), (PLAN_FILE,), (RECORD_FILE,)])
def test_overwrite_never_replaces_what_moeify_did_not_write(out: Path, present: tuple[str, ...]) -> None:
    out.mkdir(parents=True)
    for name in ("thesis.txt", *present):
        (out / name).write_text("years of work")
    before = names(out)
    with pytest.raises(InputError, match="not written by moeify"):
        finish(out, "new", overwrite=True)
    assert names(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(out: Path, overwrite: bool) -> None:
    out.parent.mkdir()
    out.write_text("years of work")
    with pytest.raises(InputError, match=r"exists|not written by moeify"):
        finish(out, "new", overwrite=overwrite)
    assert out.read_text() == "years of work"


def test_an_empty_folder_is_taken(out: Path) -> None:
    out.mkdir(parents=True)
    finish(out, "new")
    assert (out / "weights").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_before_the_commit_keeps_the_old_result(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result(out)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "commit", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finish(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "old"
    finish(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "new"


def test_a_second_run_in_another_process_is_refused(out: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from moeify.export.workspace import Workspace\n"
        "with Workspace(Path(sys.argv[1]), {'a': 1}, overwrite=False):\n"
        "    print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        for overwrite in (False, True):
            with pytest.raises(InputError, match="another run is writing") as caught:
                finish(out, "new", overwrite=overwrite)
            assert caught.value.hint
        # Its death releases the lock, and what it left is of another job.
        other.kill()
    finish(out, "new", overwrite=True)
    assert names(out.parent) == {"out", *(f"out/{name}" for name in FILES)}


def test_the_lock_is_released_after_an_error(out: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), Workspace(out, JOB, overwrite=False):
            raise ZeroDivisionError
    out.with_name("out.partial").rename(out)
    for _ in range(2):
        with pytest.raises(InputError, match="exists"), Workspace(out, JOB, overwrite=False):
            pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"disk of .* is full \([\d,]+ MB free\)"),
        (errno.EDQUOT, r"quota of the disk of .* is used up"),
        (errno.EFBIG, "largest size that is allowed"),
    ],
)
def test_a_full_disk_is_an_error_with_a_hint(
    out: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(code, "no room")

    with Workspace(out, JOB, overwrite=False) as work:
        monkeypatch.setattr(cache, "sync", full)
        with pytest.raises(DiskError, match=message) as caught:
            work.write_text("shard", "1")
        assert "same command again" in caught.value.hint
        assert not work.has("shard")


def test_a_broken_disk_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "broken disk")

    with Workspace(out, JOB, overwrite=False) as work:
        monkeypatch.setattr(cache, "sync", broken)
        with pytest.raises(DiskError, match=r"cannot write .*out\.partial: Input/output error"):
            work.write_text("shard", "1")


@pytest.mark.parametrize("where", ["file", "file/out", "file/deep/out"])
def test_a_file_where_a_folder_is_needed(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(InputError, match=str(tmp_path / "file")):
        finish(tmp_path / where, "new")
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_result_can_be_read_by_whoever_may_read_its_folder(out: Path) -> None:
    """The weights' library makes private files, the others do not: a server of another user could not load it."""
    with Workspace(out, JOB, overwrite=False) as work:
        work.write_text("config.json", "{}")
        work.write_tensors("weights", {"a": torch.ones(1)}, {"format": "pt"})
        work.commit()
    assert (out / "weights").stat().st_mode == (out / "config.json").stat().st_mode


def test_nothing_that_the_weights_library_left_behind_gets_into_the_result(out: Path) -> None:
    """It writes under a random name, which a killed run leaves there."""
    with Workspace(out, JOB, overwrite=False) as work:
        (work.path / ".tmpA1b2C3").write_text("half a shard")
        (work.path / "work" / ".tmpD4e5F6").write_text("half a layer")
    finish(out, "new")
    assert names(out) == FILES


def test_a_refusal_leaves_nothing_that_the_run_began(out: Path) -> None:
    for error in (InputError("bad weights", "none"), UsageError("bad option", "none")):
        with pytest.raises(type(error)), Workspace(out, JOB, overwrite=False) as work:
            work.save_layer(LAYER)
            raise error
        # Not even the folders above it.
        assert not out.parent.exists()


@pytest.mark.parametrize(
    "error", [DiskError("full", "none"), KeyboardInterrupt(), CheckError("loss is NaN", "none"), ZeroDivisionError()]
)
def test_what_is_finished_stays_after_anything_else(out: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), Workspace(out, JOB, overwrite=False) as work:
        work.save_layer(LAYER)
        raise error
    # Compiled code that is interrupted replaces KeyboardInterrupt, so that any error but moeify's own may be one.
    notes = getattr(error, "__notes__", [""])
    assert notes[0].startswith("kept: ") is not isinstance(error, MoeifyError)
    with Workspace(out, JOB, overwrite=False) as work:
        assert work.load_layer(3) is not None


def test_a_refusal_keeps_what_an_earlier_run_finished(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        work.save_layer(LAYER)
    with pytest.raises(InputError), Workspace(out, JOB, overwrite=False) as work:
        raise InputError("bad weights", "none")
    with Workspace(out, JOB, overwrite=False) as work:
        assert work.load_layer(3) is not None
        work.discard()
    assert not out.parent.exists() or not any(out.parent.iterdir())


def test_a_strangers_file_in_an_unfinished_folder_is_never_lost(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        work.write_text("config.json", "{}")
    notes = work.path / "notes.txt"
    notes.write_text("years of work")
    for job, overwrite in ((JOB, False), (JOB, True), ({"model": "other"}, True)):
        with pytest.raises(InputError, match=r"notes\.txt was not written by moeify"):
            finish_job(out, job, overwrite=overwrite)
    notes.unlink()
    with pytest.raises(InputError, match=r"notes\.txt was not written by moeify"), Workspace(out, JOB, overwrite=False):
        notes.write_text("years of work")
        work.write_record({}, "card")
    assert notes.read_text() == "years of work"


def finish_job(out: Path, job: dict[str, Any], *, overwrite: bool) -> None:
    with Workspace(out, job, overwrite=overwrite):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["", "work", "work/names", "config.json"])
def test_a_link_in_the_place_of_a_work_file_is_not_followed(out: Path, name: str, overwrite: bool) -> None:
    elsewhere = out.parent / "elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / "thesis.tmp").write_text("years of work")
    link = out.with_name("out.partial") / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(InputError, match="is a link, which moeify did not make"):
        finish(out, "new", overwrite=overwrite)
    assert (elsewhere / "thesis.tmp").read_text() == "years of work"
    assert link.is_symlink()


def test_a_file_that_appears_in_out_during_the_work_is_kept(out: Path) -> None:
    result(out)
    with (
        pytest.raises(InputError, match=r"notes\.txt was not written by moeify"),
        Workspace(out, JOB, overwrite=True) as work,
    ):
        work.write_record({}, "card")
        (out / "notes.txt").write_text("years of work")
        work.commit()
    assert (out / "notes.txt").read_text() == "years of work"
    # What was finished is kept as well, and only the name is missing.
    (out / "notes.txt").unlink()
    with Workspace(out, JOB, overwrite=True) as work:
        assert work.is_complete
        work.commit()
    assert names(out) == {RECORD_FILE, LAST_FILE}


def test_the_record_names_every_file(out: Path) -> None:
    with Workspace(out, JOB, overwrite=False) as work:
        work.write_text("config.json", "{}")
    # A run that goes on knows what the earlier one wrote.
    with Workspace(out, JOB, overwrite=False) as work:
        work.write_tensors("model-00001-of-00001.safetensors", {"a": torch.ones(1)}, {})
        (work.path / "logs" / "0-full").mkdir(parents=True)
        (work.path / "logs" / "0-full" / "events.out.tfevents.17.host.1").write_text("")
        work.write_record({"parameters": 3}, "card")
        work.commit()
    record = json.loads((out / RECORD_FILE).read_text())
    events = "logs/*/events.out.tfevents.*"
    assert set(record["files"]) == {"config.json", "model-00001-of-00001.safetensors", RECORD_FILE, LAST_FILE, events}
    assert (record["schema"], record["job"], record["parameters"]) == ("moeify.record/1", JOB, 3)
    finish(out, "new", overwrite=True)
    assert names(out) == FILES
