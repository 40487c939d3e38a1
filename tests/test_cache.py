"""What is made once is whole or not there, whoever is killed and whoever is faster."""

from pathlib import Path

import pytest

from moeify import cache
from moeify.cache import cache_dir, made_once
from moeify.errors import InputError


def test_environment_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MOEIFY_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "moeify"


def test_the_folder_appears_with_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with made_once(folder) as partial:
        (partial / "weights").write_text("all")
        assert not folder.exists()
    assert (folder / "weights").read_text() == "all"
    assert list(folder.parent.iterdir()) == [folder]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), made_once(tmp_path / "model") as partial:
        (partial / f"weights{1 / 0}").write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_only_a_folder_that_is_never_taken_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process runs no `finally`: what is left then must have another name than the model."""
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt), made_once(tmp_path / "model") as partial:
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [partial]
    assert ".partial-" in partial.name
    with made_once(tmp_path / "model") as again:
        assert again != partial


def test_the_slower_of_two_discards_its_copy(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with made_once(folder) as slow:
        (slow / "weights").write_text("slow")
        with made_once(folder) as fast:
            (fast / "weights").write_text("fast")
    assert (folder / "weights").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the cache") as caught, made_once(tmp_path / "file" / "model"):
        pass
    assert "MOEIFY_CACHE" in caught.value.hint
