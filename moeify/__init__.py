"""moeify: turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads.

    import moeify

    result = moeify.split("path/to/model", "path/to/out", moeify.SplitOptions(experts=8))
    assert moeify.verify("path/to/out", "path/to/model").passed
    model = moeify.load("path/to/out")

Names are imported when first used, so that `import moeify` and `moeify --help` cost nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moeify.version import __version__

if TYPE_CHECKING:
    from moeify.bench import bench
    from moeify.benchmark.inputs import BenchOptions
    from moeify.benchmark.model_results import ModelBench
    from moeify.compare import Comparison, compare
    from moeify.errors import CheckError, InputError, MoeifyError, UsageError
    from moeify.evaluate import EvalResult, evaluate, load
    from moeify.finetune import FinetuneResult, finetune
    from moeify.options import SplitOptions
    from moeify.plan import SplitPlan, load_plan
    from moeify.report import ReportResult, report
    from moeify.search import SearchResult, search
    from moeify.split import SplitResult, split
    from moeify.training.options import FinetuneOptions
    from moeify.tune import TuneResult, tune_model
    from moeify.verify import VerifyReport, verify

__all__ = [
    "BenchOptions",
    "CheckError",
    "Comparison",
    "EvalResult",
    "FinetuneOptions",
    "FinetuneResult",
    "InputError",
    "ModelBench",
    "MoeifyError",
    "ReportResult",
    "SearchResult",
    "SplitOptions",
    "SplitPlan",
    "SplitResult",
    "TuneResult",
    "UsageError",
    "VerifyReport",
    "__version__",
    "bench",
    "compare",
    "evaluate",
    "finetune",
    "load",
    "load_plan",
    "report",
    "search",
    "split",
    "tune_model",
    "verify",
]

_HOMES = {
    "bench": ("bench",),
    "benchmark.inputs": ("BenchOptions",),
    "benchmark.model_results": ("ModelBench",),
    "compare": ("Comparison", "compare"),
    "errors": ("CheckError", "InputError", "MoeifyError", "UsageError"),
    "evaluate": ("EvalResult", "evaluate", "load"),
    "finetune": ("FinetuneResult", "finetune"),
    "training.options": ("FinetuneOptions",),
    "options": ("SplitOptions",),
    "plan": ("SplitPlan", "load_plan"),
    "report": ("ReportResult", "report"),
    "search": ("SearchResult", "search"),
    "split": ("SplitResult", "split"),
    "tune": ("TuneResult", "tune_model"),
    "verify": ("VerifyReport", "verify"),
}


class _Package(ModuleType):
    """Importing moeify.split binds the module as `moeify.split`; the function of that name is what is meant."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES.get(name, ()):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"moeify.{home}"), name)
            # `split`, `verify` and `evaluate` are also the names of their modules, which importing has just bound.
            globals()[name] = value
            return value
    raise AttributeError(f"module 'moeify' has no attribute {name!r}")
