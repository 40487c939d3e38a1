"""What plug-ins and recipes there are, each with the first line of its file. Reads the files, imports none of them."""

import ast
from pathlib import Path

import yaml

from moeify.errors import UsageError

PLUGINS = {
    "families": "families",
    "targets": "targets",
    "partitions": "partition",
    "routers": "routers",
    "strategies": "strategies",
}


def entries(kind: str) -> list[tuple[str, str]]:
    """(name, first line) of everything of a kind.

    Raises:
        UsageError: no such kind.
    """
    if kind == "recipes":
        return [
            (path.stem, _first_comment(path)) for folder in recipe_folders() for path in sorted(folder.glob("*.yaml"))
        ]
    if kind not in PLUGINS:
        raise UsageError(f"no list of {kind!r}", f"one of: {', '.join((*PLUGINS, 'recipes'))}")
    files = sorted((Path(__file__).parent / PLUGINS[kind]).glob("[!_]*.py"))
    return [(file.stem, (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]) for file in files]


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
