"""moeify: turn a dense Hugging Face transformer into a mixture-of-experts checkpoint that stock software loads.

    import moeify

    result = moeify.split("path/to/model", "path/to/out", experts=8)
    assert moeify.verify("path/to/out", "path/to/model").passed
    model = moeify.load("path/to/out")

In a terminal or notebook long loops show a bar; `track=moeify.untracked` keeps them silent.
Names are imported when first used, so that `import moeify` and `moeify --help` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moeify.modeling import registration
from moeify.version import __version__

if TYPE_CHECKING:
    from moeify.benchmark.models.results import ModelBench
    from moeify.benchmark.models.run import bench, load_bench
    from moeify.benchmark.options import BenchOptions
    from moeify.check.compare import Comparison, compare
    from moeify.check.evaluate import evaluate, load
    from moeify.check.generate import GenerateResult, generate
    from moeify.check.perplexity import EvalResult
    from moeify.check.verify import VerifyReport, verify
    from moeify.convert.inspection import Inspection, inspect
    from moeify.convert.machine_plan import MachinePlan, plan_for_machine
    from moeify.convert.pipeline import SplitResult, split
    from moeify.convert.preview import Preview, preview
    from moeify.convert.search import SearchResult, search
    from moeify.errors import CheckError, InputError, MoeifyError, MoeifyWarning, UsageError
    from moeify.export.gguf.export import export_gguf
    from moeify.export.gguf.result import ExportResult
    from moeify.kernels.tune_model import TuneResult, tune_model
    from moeify.options import ExportOptions, GenerateOptions, MachineOptions, SplitOptions, untracked
    from moeify.plan import SplitPlan, load_plan
    from moeify.recipes.model import Recipe, load_recipe
    from moeify.recipes.preview import RunPreview, preview_run
    from moeify.recipes.run import RunResult, run
    from moeify.reporting.report import ReportResult, report
    from moeify.training.finetune import FinetuneResult, finetune
    from moeify.training.freeze import freeze_routers
    from moeify.training.options import FinetuneOptions
    from moeify.training.within import TimedSplit, split_within

__all__ = [
    "BenchOptions",
    "CheckError",
    "Comparison",
    "EvalResult",
    "ExportOptions",
    "ExportResult",
    "FinetuneOptions",
    "FinetuneResult",
    "GenerateOptions",
    "GenerateResult",
    "InputError",
    "Inspection",
    "MachineOptions",
    "MachinePlan",
    "ModelBench",
    "MoeifyError",
    "MoeifyWarning",
    "Preview",
    "Recipe",
    "ReportResult",
    "RunPreview",
    "RunResult",
    "SearchResult",
    "SplitOptions",
    "SplitPlan",
    "SplitResult",
    "TimedSplit",
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
    "generate",
    "inspect",
    "load",
    "load_bench",
    "load_plan",
    "load_recipe",
    "plan_for_machine",
    "preview",
    "preview_run",
    "report",
    "run",
    "search",
    "split",
    "split_within",
    "tune_model",
    "untracked",
    "verify",
]

_HOMES = {
    "benchmark.models.results": ("ModelBench",),
    "benchmark.models.run": (
        "bench",
        "load_bench",
    ),
    "benchmark.options": ("BenchOptions",),
    "check.compare": (
        "Comparison",
        "compare",
    ),
    "check.evaluate": (
        "evaluate",
        "load",
    ),
    "check.generate": (
        "GenerateResult",
        "generate",
    ),
    "check.perplexity": ("EvalResult",),
    "check.verify": (
        "VerifyReport",
        "verify",
    ),
    "convert.inspection": (
        "Inspection",
        "inspect",
    ),
    "convert.machine_plan": (
        "MachinePlan",
        "plan_for_machine",
    ),
    "convert.pipeline": (
        "SplitResult",
        "split",
    ),
    "convert.preview": (
        "Preview",
        "preview",
    ),
    "convert.search": (
        "SearchResult",
        "search",
    ),
    "errors": (
        "CheckError",
        "InputError",
        "MoeifyError",
        "MoeifyWarning",
        "UsageError",
    ),
    "export.gguf.export": ("export_gguf",),
    "export.gguf.result": ("ExportResult",),
    "kernels.tune_model": (
        "TuneResult",
        "tune_model",
    ),
    "options": (
        "ExportOptions",
        "GenerateOptions",
        "MachineOptions",
        "SplitOptions",
        "untracked",
    ),
    "plan": (
        "SplitPlan",
        "load_plan",
    ),
    "recipes.model": (
        "Recipe",
        "load_recipe",
    ),
    "recipes.preview": (
        "RunPreview",
        "preview_run",
    ),
    "recipes.run": (
        "RunResult",
        "run",
    ),
    "reporting.report": (
        "ReportResult",
        "report",
    ),
    "training.finetune": (
        "FinetuneResult",
        "finetune",
    ),
    "training.freeze": ("freeze_routers",),
    "training.options": ("FinetuneOptions",),
    "training.within": (
        "TimedSplit",
        "split_within",
    ),
}

# A checkpoint of moeify's own architecture then loads like any other, by `AutoModelForCausalLM.from_pretrained`.
registration.register()


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"moeify.{home}"), name)
    raise AttributeError(f"module 'moeify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
