"""What plug-ins and recipes there are, each with the first line of its file. Reads the files, imports none of them."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from moeify.errors import unknown

PLUGINS = {
    "families": "families",
    "targets": "targets",
    "engines": "engines",
    "partitions": "partition",
    "routers": "routers",
    "strategies": "strategies",
}
# One of a folder's, with its article.
SINGULAR = {
    "families": "a family",
    "targets": "a target",
    "engines": "an engine",
    "partition": "a partition",
    "routers": "a router",
    "strategies": "a strategy",
}


@dataclass(frozen=True)
class Listing:
    """Everything of a kind: name -> first line of its file."""

    kind: str
    entries: Mapping[str, str]


def listing(kind: str) -> Listing:
    """All plug-ins of a kind, or all recipes.

    Raises:
        UsageError: no such kind.
    """
    if kind == "recipes":
        paths = [path for folder in recipe_folders() for path in sorted(folder.glob("*.yaml"))]
        return Listing(kind, {path.stem: _first_comment(path) for path in paths})
    if kind not in PLUGINS:
        raise unknown("something that can be listed", kind, (*PLUGINS, "recipes"))
    files = _files(PLUGINS[kind])
    first = {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] for file in files}
    return Listing(kind, first)


def plugin_names(folder: str) -> list[str]:
    """Sorted names of the plug-ins in a folder of moeify, such as `partition`; imports nothing."""
    return [file.stem for file in _files(folder)]


def _files(folder: str) -> list[Path]:
    return sorted((Path(__file__).parent / folder).glob("[!_]*.py"))


def recipe_folders() -> list[Path]:
    """Where recipes lie: beside the package in a checkout, else where the wheel put them."""
    import sysconfig

    folders = [
        Path(__file__).parent.parent / "recipes",
        Path(sysconfig.get_path("data")) / "share" / "moeify" / "recipes",
    ]
    return [folder for folder in folders if (folder / "quickstart.yaml").is_file()][:1]


def _first_comment(path: Path) -> str:
    first = path.read_text().split("\n")[0]
    return first.removeprefix("# ") if first.startswith("#") else str(yaml.safe_load(path.read_text()).get("model", ""))
