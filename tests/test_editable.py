"""`pip install -e .` is a plain path, so that mypy and editors see the package and its types."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as backend; backend.build_editable('wheel')"


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="builds with setuptools, which is not here")
def test_an_editable_install_is_a_plain_path(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("moeify", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "wheel").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        paths = [name for name in opened.namelist() if name.endswith(".pth")]
        assert [opened.read(name).decode().strip() for name in paths] == [str(source)]
        assert not any(name.endswith("_finder.py") for name in opened.namelist())
    assert (source / "moeify" / "py.typed").is_file()
