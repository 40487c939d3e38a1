"""Options of `moeify split`, in one place for the command line, recipes and the Python API. Imports nothing heavy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moeify.errors import UsageError

Item = TypeVar("Item")
# Wraps a long loop to show its progress: (items, what they are, how many). `untracked` shows nothing.
Track = Callable[[Iterable[Item], str, int], Iterable[Item]]

DType = Literal["auto", "float32", "bfloat16", "float16"]
Style = Literal["hard", "softmax", "soft"]
Fusion = Literal["sum", "mean"]
RefitTo = Literal["ffn", "stream"]


def untracked(items: Iterable[Any], label: str, total: int) -> Iterable[Any]:  # noqa: ARG001
    """The progress of a caller who wants none."""
    return items


@dataclass(frozen=True)
class SplitOptions:
    """How to cut a model.

    Args:
        experts: equal slices of each FFN.
        shared: slices that are always on; None lets the layout choose.
        active: slices that run for a token, shared ones included; None means three quarters.
        static: keep the active slices and drop the rest, as an ordinary smaller dense model: the control.
        dense_layers: layers whose FFN stays whole.
        budget: share of all FFN parameters that may be active per token; shared, active and dense layers follow from
            it by a greedy search.
        partition, router: names of plug-ins.
        mixing: `hard` gives every chosen expert weight one, `softmax` weights them by their scores, `soft` runs all of
            them, weighted.
        temperature: scores are divided by it before a softmax.
        fusion: the chosen experts' weights add up to their number (`sum`) or to one (`mean`).
        refit: fit down_proj in closed form.
        refit_to: what the refit aims for: what the dense FFN gives on the same input (`ffn`), or whatever brings the
            residual stream back to the dense model's (`stream`).
        target: a MoE architecture or `auto`.
        calibration: text sources; each gives an equal share of the tokens.
        tokens: calibration tokens.
        context: tokens of one calibration block; None means 512 or as many as the model takes.
        seed: of text sampling, clustering and projections.
        dtype: of the written checkpoint; `auto` keeps the dense one's.
        device: where the arithmetic runs.
        plan: a saved plan whose partition and routers are used again.
    """

    experts: int = 8
    shared: int | None = None
    active: int | None = None
    static: bool = False
    dense_layers: tuple[int, ...] = ()
    budget: float | None = None
    partition: str = "routed"
    router: str = "ridge"
    mixing: Style = "hard"
    temperature: float = 1.0
    fusion: Fusion = "sum"
    refit: bool = True
    refit_to: RefitTo = "ffn"
    target: str = "auto"
    calibration: tuple[str, ...] = ("builtin",)
    tokens: int = 16384
    context: int | None = None
    seed: int = 0
    dtype: DType = "auto"
    device: str = "cpu"
    plan: str | None = None

    # For pydantic, which validates this class inside a recipe.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        # Every layer adds its number, and scikit-learn's generators take 32 bits.
        if not 0 <= self.seed < 1 << 31:
            raise UsageError(f"seed {self.seed} is out of range", "--seed takes 0 to 2,147,483,647")
        if not self.temperature > 0:
            raise UsageError(f"temperature {self.temperature} is out of range", "--temperature takes more than zero")
        if self.static and self.shared is not None:
            raise UsageError("--static keeps every active slice always on", "leave --shared out")
        if self.static and self.target != "auto":
            raise UsageError("--static writes the dense model's own architecture", "leave --target out")
        if self.static and self.plan is not None:
            raise UsageError("--static and --plan exclude each other", "leave one of them out")
