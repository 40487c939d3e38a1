"""What a split says of a layer: the energy that choices keep, and the load of its experts.

Legend: T tokens, F neurons, R routed experts.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moeify.calibration.activations import ActivationStats
from moeify.calibration.share import Share
from moeify.calibration.store import stretches
from moeify.experts.mixing import UNIT, choose_experts
from moeify.layout import Layout

# Of the energy; a share of less than this says nothing.
SMALLEST_GAIN = 0.001


def static_diagnostics(stats: ActivationStats, layout: Layout) -> dict[str, float]:
    """Massive neurons, and the share of contribution energy that the best static choice of the same size keeps."""
    energy_F = stats.energy_F.sort(descending=True).values
    count = layout.num_active * layout.expert_width(energy_F.numel())
    return {
        "massive_neurons": float(stats.massive_F.sum()),
        "energy_kept_static": _share(energy_F[:count].sum(), energy_F.sum()),
    }


def router_diagnostics(
    norms_TR: Tensor, scores_TR: Tensor, shared_energy: Tensor, layout: Layout, share: Share
) -> dict[str, float]:
    """Energy that the router's choices keep, that of an oracle which knows the norms, and the load of the experts."""
    _, num_tokens = share.place(len(norms_TR))
    # Of the choices, the oracle's, and all.
    energies, load_R = shared_energy.new_zeros(3), shared_energy.new_zeros(layout.num_routed)
    for rows in stretches(len(norms_TR)):
        norms_tR, scores_tR = (array[rows].to(shared_energy.device) for array in (norms_TR, scores_TR))
        energy_tR, keep_tR = norms_tR.square(), UNIT.weights(scores_tR, layout) > 0
        best = (energy_tR * choose_experts(norms_tR, layout)).sum()
        energies += torch.stack([(energy_tR * keep_tR).sum(), best, energy_tR.sum()])
        load_R += keep_tR.to(load_R.dtype).sum(dim=0)
    chosen, best, routed = share.sum(energies) / num_tokens
    total = shared_energy + routed
    load_R = share.sum(load_R) / num_tokens
    probability_R = load_R / load_R.sum()
    entropy = -(probability_R * probability_R.clamp(min=torch.finfo(torch.float32).tiny).log()).sum()
    return {
        "energy_kept": _share(shared_energy + chosen, total),
        "energy_kept_oracle": _share(shared_energy + best, total),
        "router_energy_of_oracle": _share(chosen, best),
        "active_experts": float(load_R.sum()) + layout.num_shared,
        "smallest_expert_load": float(load_R.min()),
        "largest_expert_load": float(load_R.max()),
        # One if every expert gets as many tokens as any other.
        "load_entropy": float(entropy) / math.log(len(load_R)) if len(load_R) > 1 else 1.0,
    }


def oracle_gain(found: Mapping[str, float]) -> dict[str, float]:
    """Share of the oracle's gain over static pruning that the router reaches, where there is one to reach.

    Negative if the router is worse than static pruning.
    """
    static, best = found["energy_kept_static"], found["energy_kept_oracle"]
    if best - static < SMALLEST_GAIN:
        return {}
    return {"oracle_gain_reached": (found["energy_kept"] - static) / (best - static)}


def _share(part: Tensor, whole: Tensor) -> float:
    """One of a silent FFN, which loses nothing."""
    return float(part / whole) if whole > 0 else 1.0
