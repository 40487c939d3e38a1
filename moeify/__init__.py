"""moeify: turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads.

    import moeify

    result = moeify.split("path/to/model", "path/to/out", moeify.SplitOptions(experts=8))
    assert moeify.verify("path/to/out", "path/to/model").passed
    model = moeify.load("path/to/out")

Names are imported when first used, so that `import moeify` and `moeify --help` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moeify.version import __version__

if TYPE_CHECKING:
    from moeify.benchmark.models.results import ModelBench
    from moeify.benchmark.models.run import bench
    from moeify.benchmark.options import BenchOptions
    from moeify.check.compare import Comparison, compare
    from moeify.check.evaluate import evaluate, load
    from moeify.check.perplexity import EvalResult
    from moeify.check.verify import VerifyReport, verify
    from moeify.convert.pipeline import SplitResult, split
    from moeify.convert.search import SearchResult, search
    from moeify.errors import CheckError, InputError, MoeifyError, UsageError
    from moeify.export.gguf.export import export_gguf
    from moeify.export.gguf.result import ExportResult
    from moeify.kernels.tune_model import TuneResult, tune_model
    from moeify.options import ExportOptions, SplitOptions
    from moeify.plan import SplitPlan, load_plan
    from moeify.reporting.report import ReportResult, report
    from moeify.training.finetune import FinetuneResult, finetune
    from moeify.training.freeze import freeze_routers
    from moeify.training.options import FinetuneOptions

__all__ = [
    "BenchOptions",
    "CheckError",
    "Comparison",
    "EvalResult",
    "ExportOptions",
    "ExportResult",
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
    "export_gguf",
    "finetune",
    "freeze_routers",
    "load",
    "load_plan",
    "report",
    "search",
    "split",
    "tune_model",
    "verify",
]

_HOMES = {
    "benchmark.models.results": ("ModelBench",),
    "benchmark.models.run": ("bench",),
    "benchmark.options": ("BenchOptions",),
    "check.compare": ("Comparison", "compare"),
    "check.evaluate": ("evaluate", "load"),
    "check.perplexity": ("EvalResult",),
    "check.verify": ("VerifyReport", "verify"),
    "convert.pipeline": ("SplitResult", "split"),
    "convert.search": ("SearchResult", "search"),
    "export.gguf.export": ("export_gguf",),
    "export.gguf.result": ("ExportResult",),
    "errors": ("CheckError", "InputError", "MoeifyError", "UsageError"),
    "kernels.tune_model": ("TuneResult", "tune_model"),
    "options": ("ExportOptions", "SplitOptions"),
    "plan": ("SplitPlan", "load_plan"),
    "reporting.report": ("ReportResult", "report"),
    "training.finetune": ("FinetuneResult", "finetune"),
    "training.freeze": ("freeze_routers",),
    "training.options": ("FinetuneOptions",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"moeify.{home}"), name)
    raise AttributeError(f"module 'moeify' has no attribute {name!r}")
