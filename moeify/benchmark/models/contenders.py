"""Who takes part in a speed measurement: each model on each experts implementation that really runs here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from moeify.benchmark.models.anatomy import Anatomy, experts_modules
from moeify.benchmark.options import Implementation
from moeify.kernels import register
from moeify.kernels.experts import NAME as OURS
from moeify.kernels.experts import first_projection, unsupported

DENSE = "dense"
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
# batched_mm copies the weights of every token's experts: no more than this share of the memory that is left.
COPIES_SHARE = 0.5


@dataclass(frozen=True)
class Contender:
    """One loaded model on one implementation of experts.

    Args:
        name: of the model.
        implementation: `dense` for a model without experts.
        model: loaded.
        anatomy: of it.
    """

    name: str
    implementation: str
    model: Any
    anatomy: Anatomy

    def ready(self) -> None:
        """Implementations of one model take turns, too."""
        if self.implementation != DENSE:
            self.model.set_experts_implementation(self.implementation)


def contenders(
    models: Mapping[str, Any], anatomies: Mapping[str, Anatomy], implementations: Sequence[str] = ()
) -> list[Contender]:
    """Every model on these implementations; without any, on each one that runs here."""
    register()
    ready = []
    for name, model in models.items():
        if anatomies[name].experts is None:
            ready.append(Contender(name, DENSE, model, anatomies[name]))
            continue
        for implementation in implementations or IMPLEMENTATIONS:
            contender = Contender(name, implementation, model, anatomies[name])
            # Where our kernels do not run another implementation would, silently.
            if implementations or implementation != OURS or not our_reason(model):
                ready.append(contender)
    return ready


def our_reason(model: Any) -> str | None:
    """Why moeify's kernels do not run the experts of this model where it is; None if they do."""
    for module in experts_modules(model).values():
        weights = first_projection(module)
        reason = unsupported(module, weights.new_zeros(1, weights.shape[-1]))
        if reason:
            return reason
    return None


def refusal(who: Contender, num_tokens: int) -> str:
    """Why a contender is not even tried on so many tokens."""
    experts = who.anatomy.experts
    if experts is None:
        return ""
    if who.implementation == OURS:
        return our_reason(who.model) or ""
    if who.implementation == "batched_mm":
        copies = num_tokens * experts.num_chosen * experts.parameters_each * who.model.dtype.itemsize
        free = free_bytes(who.model.device)
        if copies > COPIES_SHARE * free:
            return f"it would copy {copies / 1e9:,.1f} GB of weights, {free / 1e9:,.1f} GB are free"
    return ""


def free_bytes(device: torch.device) -> int:
    """Memory that is left."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
