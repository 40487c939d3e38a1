"""What plug-ins, recipes and words there are, each with one sentence. Reads files of plug-ins, imports none of them."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from moeify import plugins
from moeify.errors import unknown
from moeify.readable import Readable
from moeify.words import DEFINITIONS

PLUGINS = {
    "families": "families",
    "targets": "targets",
    "engines": "engines",
    "partitions": "partition",
    "routers": "routers",
    "strategies": "strategies",
}


@dataclass(frozen=True, repr=False)
class Listing(Readable):
    """Everything of a kind: name -> first line of its file, or the word's meaning."""

    kind: str
    entries: Mapping[str, str]


def listing(kind: str) -> Listing:
    """All plug-ins of a kind, all recipes, or all words.

    Raises:
        UsageError: no such kind.
    """
    if kind == "recipes":
        paths = [path for folder in recipe_folders() for path in sorted(folder.glob("*.yaml"))]
        return Listing(kind, {path.stem: _first_comment(path) for path in paths})
    if kind == "words":
        return Listing(kind, DEFINITIONS)
    if kind not in PLUGINS:
        raise unknown("something that can be listed", kind, (*PLUGINS, "recipes", "words"))
    files = plugins.files(PLUGINS[kind])
    first = {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] for file in files}
    return Listing(kind, first)


def recipe_folders() -> list[Path]:
    """Where recipes lie: beside the package in a checkout, else where the wheel put them, for all or for one user."""
    import sysconfig

    user = sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))
    shares = [Path(place) / "share" / "moeify" / "recipes" for place in (sysconfig.get_path("data"), user)]
    folders = [Path(__file__).parent.parent / "recipes", *shares]
    return [folder for folder in folders if (folder / "quickstart.yaml").is_file()][:1]


def _first_comment(path: Path) -> str:
    first = path.read_text().split("\n")[0]
    return first.removeprefix("# ") if first.startswith("#") else str(yaml.safe_load(path.read_text()).get("model", ""))
