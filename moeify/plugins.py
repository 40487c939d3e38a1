"""Plug-ins are files: the file name is the public name, a leading underscore means "none", nothing is registered."""

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from moeify.errors import unknown

# One of a folder's, with its article.
SINGULAR = {
    "families": "a family",
    "targets": "a target",
    "engines": "an engine",
    "partition": "a partition",
    "routers": "a router",
    "strategies": "a strategy",
}


def names_in(folder: str) -> list[str]:
    """As `names`, of a folder of moeify such as `partition`; does not import the folder itself either."""
    return [file.stem for file in files(folder)]


def files(folder: str) -> list[Path]:
    """Those in a folder of moeify, such as `partition`; imports nothing, not even the folder."""
    return sorted((Path(__file__).parent / folder).glob("[!_]*.py"))


def names(package: str) -> list[str]:
    """Sorted names of all plug-ins in a package such as `moeify.partition`; imports none of them."""
    folders = importlib.import_module(package).__path__
    return list(_names(*((folder, Path(folder).stat().st_mtime_ns) for folder in folders)))


@cache
def _names(*folders: tuple[str, int]) -> list[str]:
    """Those in folders as they were changed last; a search asks for them thousands of times."""
    modules = pkgutil.iter_modules([folder for folder, _ in folders])
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def load(package: str, name: str, attribute: str, *default: Any) -> Any:
    """Import one plug-in and return its public attribute, or the default if one is given and the file has none.

    Raises:
        UsageError: there is no such file.
        AttributeError: the file does not define `attribute`; a broken plug-in fails loudly, by name.
    """
    known = names(package)
    kind = package.rsplit(".", maxsplit=1)[-1]
    if name not in known:
        raise unknown(SINGULAR.get(kind, f"a {kind}"), name, known)
    return getattr(importlib.import_module(f"{package}.{name}"), attribute, *default)
