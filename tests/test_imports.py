"""Imports point one way, heavy ones wait until they are needed, one file prints, plug-ins keep their contract."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import moeify
from moeify import plugins, targets
from moeify.errors import UsageError

PACKAGE = Path(moeify.__file__).parent
FILES = {
    ".".join(("moeify", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ATTRIBUTES = {
    "moeify.families": "FAMILY",
    "moeify.targets": "TARGET",
    "moeify.engines": "ENGINE",
    "moeify.partition": "partition",
    "moeify.routers": "fit",
    "moeify.strategies": "choose",
}
PLUGINS = [(package, name, attribute) for package, attribute in ATTRIBUTES.items() for name in plugins.names(package)]
# From the ground floor up: a room may import its own files, the nouns that lie beside the rooms, and rooms below it.
FLOORS = (
    ("families", "modeling"),
    ("models", "strategies"),
    ("calibration", "data", "experts"),
    ("engines", "kernels", "partition", "routers"),
    ("targets",),
    ("export",),
    ("convert",),
    ("check",),
    ("training",),
    ("benchmark",),
    ("recipes", "reporting"),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What everybody knows; plug-ins are files of their room.
NOUNS = {
    "cache",
    "command_line",
    "errors",
    "layout",
    "layout_checks",
    "options",
    "plan",
    "plugin_list",
    "plugins",
    "progress",
    "readable",
    "resources",
    "results",
    "version",
    "words",
}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def imports_of(path: Path, *, everywhere: bool) -> set[str]:
    """Modules of moeify that a file imports; those for type checking alone do not count.

    Args:
        everywhere: also those inside functions.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef) and not everywhere:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in FILES else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in found if name in FILES}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_files_are_found() -> None:
    assert {"moeify", "moeify.cli.app", "moeify.families.llama", "moeify.partition._balanced"} <= set(FILES)
    assert "moeify.convert.pipeline" in imports_of(FILES["moeify.cli.commands.split"], everywhere=True)
    assert "moeify.convert.pipeline" not in imports_of(FILES["moeify.cli.commands.split"], everywhere=False)


def test_imports_have_no_cycle() -> None:
    graph = {name: imports_of(path, everywhere=False) - {name, "moeify"} for name, path in FILES.items()}
    # Raises if there is one.
    list(TopologicalSorter(graph).static_order())


def test_every_room_has_a_floor() -> None:
    assert {room_of(name) for name in FILES} - {"", "__main__"} == set(FLOOR) | NOUNS


def test_a_room_knows_only_rooms_below_it() -> None:
    for name, path in FILES.items():
        room = room_of(name)
        if room not in FLOOR:
            continue
        for known in {room_of(module) for module in imports_of(path, everywhere=True)} - {"", room} - NOUNS:
            assert FLOOR[known] < FLOOR[room], f"{path} imports {known}"


def test_the_nouns_know_no_room() -> None:
    for name, path in FILES.items():
        if room_of(name) in NOUNS:
            found = {room_of(module) for module in imports_of(path, everywhere=True)} - {""}
            assert found <= NOUNS, f"{path} imports {found - NOUNS}"


def test_only_the_command_line_knows_the_renderer() -> None:
    for name, path in FILES.items():
        if room_of(name) != "cli" and name != "moeify.__main__":
            assert "cli" not in {room_of(module) for module in imports_of(path, everywhere=True)}, path
        if not name.startswith("moeify.cli.app"):
            found = imports_of(path, everywhere=True)
            assert not any(module.startswith("moeify.cli.commands.") for module in found), path


def test_importing_moeify_and_its_command_line_imports_no_torch() -> None:
    code = (
        "import sys, moeify, moeify.cli.app, moeify.plugin_list, moeify.options, moeify.strategies.greedy;"
        "print([n for n in ('torch', 'transformers', 'sklearn', 'ot', 'datasets', 'rich') if n in sys.modules])"
    )
    assert run(code) == "[]"


def test_help_imports_no_torch() -> None:
    code = (
        "import contextlib, io, sys\n"
        "from moeify.cli.app import run_command\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out: code = run_command(['split', '--help'])\n"
        "print(code, '--experts' in out.getvalue(), 'torch' in sys.modules)"
    )
    assert run(code) == "0 True False"


def test_every_public_name_is_there() -> None:
    assert {"split", "verify", "evaluate", "load", "SplitOptions", "MoeifyError"} <= set(moeify.__all__)
    assert all(getattr(moeify, name) is not None for name in moeify.__all__)
    assert not hasattr(moeify, "no_such_name")


def test_only_the_renderer_prints() -> None:
    for name, path in FILES.items():
        if name in ("moeify.cli.render", "moeify.benchmark.layers.__main__"):
            # python -m moeify.benchmark.layers runs where rich is not installed.
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printing = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        writing = [call.lineno for call in calls if ast.unparse(call.func) in ("sys.stdout.write", "sys.stderr.write")]
        assert not printing + writing, f"{path}:{printing + writing}"


def test_files_and_plugins_are_described_in_their_first_line() -> None:
    for name, path in FILES.items():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        assert len(first) > 15, name


@pytest.mark.parametrize(
    ("package", "name", "attribute"), PLUGINS, ids=[f"{package}.{name}" for package, name, _ in PLUGINS]
)
def test_every_plugin_has_its_attribute(package: str, name: str, attribute: str) -> None:
    found = plugins.load(package, name, attribute)
    assert found is getattr(importlib.import_module(f"{package}.{name}"), attribute)
    if attribute in ("FAMILY", "TARGET"):
        assert found.model_type == name
    elif attribute == "ENGINE":
        assert any(found.name in targets.find(target).engines for target in targets.names())
    else:
        assert callable(found)


def test_plugins_are_the_files_without_an_underscore() -> None:
    for package in ATTRIBUTES:
        files = {path.stem for path in (PACKAGE / package.split(".")[1]).glob("*.py")}
        assert set(plugins.names(package)) == {name for name in files if not name.startswith("_")}
        assert len(plugins.names(package)) >= 1


def test_an_unknown_plugin_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="'kmean' is not a partition") as caught:
        plugins.load("moeify.partition", "kmean", "partition")
    assert caught.value.hint.startswith("did you mean kmeans? there are contiguous, ")
    with pytest.raises(UsageError):
        plugins.load("moeify.partition", "_balanced", "partition")


def test_a_broken_plugin_fails_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenplugs").mkdir()
    (tmp_path / "brokenplugs" / "__init__.py").write_text("")
    (tmp_path / "brokenplugs" / "empty.py").write_text('"""Nothing."""\n')
    (tmp_path / "brokenplugs" / "_hidden.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.names("brokenplugs") == ["empty"]
    with pytest.raises(AttributeError, match=r"brokenplugs\.empty.*partition"):
        plugins.load("brokenplugs", "empty", "partition")
