"""Tells transformers of moeify's own model: at once if it is imported already, else as soon as it is.

transformers takes a second to import, `import moeify` nothing.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Where transformers looks up what a config.json says.
AUTO = "transformers.models.auto.configuration_auto"


class _Waiting(MetaPathFinder):
    """Finds nothing of its own: registers behind the import of AUTO."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            _register_behind(spec.loader)
        return spec


def register() -> None:
    """Make `moeify` a model type of transformers; calling it again changes nothing."""
    # Another thread may be importing it: then it is not all there.
    if hasattr(sys.modules.get(AUTO), "AutoConfig"):
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register_behind(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register()

    loader.exec_module = exec_module


def _register() -> None:
    from moeify.modeling.configuration_moeify import MODEL_TYPE, MoeifyConfig

    sys.modules[AUTO].AutoConfig.register(MODEL_TYPE, MoeifyConfig, exist_ok=True)
