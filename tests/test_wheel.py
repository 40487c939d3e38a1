"""What a wheel holds is enough: outside the checkout a recipe runs and a report is made; extras are extras."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import MakeDense

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Import names of what only extras install.
OPTIONAL = ("datasets", "evaluate", "gguf", "lm_eval", "pandas", "peft", "pyarrow", "tensorboard")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as building leaves files behind."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("needs pip and setuptools to build a wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("moeify", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (file,) = out.iterdir()
    return file


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "moeify").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    assert {"moeify/py.typed", "moeify/reporting/report.html.j2"} <= package
    assert package <= names
    recipes = {name.rpartition("/")[2] for name in names if "/share/moeify/recipes/" in name}
    assert recipes == {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert not any(name.startswith(("tests/", "build/")) for name in names)


def test_all_has_every_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = re.fullmatch(r"moeify\[(.*)\]", everything)
    assert named is not None
    assert set(named[1].split(",")) == set(extras) - {"all", "test"}
    assert "moeify[all]" in extras["test"]


def test_the_base_install_works_without_what_only_extras_need(tmp_path: Path) -> None:
    """Every module is imported where the packages of extras do not exist; those that write GGUF need theirs."""
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder
from pathlib import Path

class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Others
root = Path({str(ROOT)!r})
for file in sorted((root / "moeify").rglob("*.py")):
    module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    if module.endswith("__main__") or "gguf" in module.replace("moeify.models.gguf", ""):
        continue
    importlib.import_module(module)
from moeify.data.documents import read_documents
from moeify.errors import InputError
for source, package in (("org/name", "datasets"), ("part.parquet", "pyarrow")):
    try:
        next(iter(read_documents(source)))
    except InputError as error:
        assert package in str(error) and "moeify[data]" in error.hint, error
    else:
        raise AssertionError(source)
"""
    (tmp_path / "part.parquet").write_bytes(b"PAR1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_wheel_runs_a_recipe_and_makes_a_report_outside_of_the_checkout(
    wheel: Path, make_dense: MakeDense, tmp_path: Path
) -> None:
    """In an environment of its own, which has the libraries of this one and no checkout."""
    place = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    install = ["install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(place), *install], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    # Behind its own packages, and without the .pth files there, one of which may lead to the checkout.
    (own / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)

    def run(program: str, *words: str) -> str:
        command = [str(place / "bin" / program), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    bench = ("seconds_per_row=0", "batch=[1]", "prompt=[16]", "skip=[memory]", "tokens=256")
    dense = make_dense("llama", intermediate_size=128)
    values = [
        f"model={dense}",
        "controls={}",
        "split.tokens=1024",
        "eval.tokens=256",
        *(f"bench.{value}" for value in bench),
    ]
    run("moeify", "run", "quickstart", "-o", "run", *(word for value in values for word in ("--set", value)))
    assert "report.html" in run("moeify", "report", "run")
    assert "Should I use it?" in (tmp_path / "run" / "report.html").read_text()
    assert str(own) in run("python", "-c", "import moeify; print(moeify.__file__)")
