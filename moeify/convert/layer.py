"""One layer: partition, router, refit, and what the converted FFN then gives.

Legend: T tokens, D hidden size, F neurons, R routed experts, f neurons of one expert, K routed experts a token uses.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeify.calibration.activations import Activations, ActivationStats, measure
from moeify.convert.refit import refit
from moeify.experts.mixing import Mixing, choose_experts
from moeify.export.writer import check_fits
from moeify.models.ffn import FFNWeights
from moeify.partition import Partition
from moeify.plan import SHARED, LayerPlan, Layout
from moeify.routers import Fit, LinearRouter, Router, RoutingTask
from moeify.targets import ROUTER_LIMIT

# Of the energy; a share of less than this says nothing.
SMALLEST_GAIN = 0.001


@dataclass(frozen=True)
class LayerFit:
    """The methods and numbers that are the same for every layer."""

    layout: Layout
    partition: Partition
    router: Fit
    mixing: Mixing
    refit: bool
    dtype: torch.dtype
    seed: int


@dataclass(frozen=True)
class ConvertedFFN:
    """One FFN as the written checkpoint will compute it.

    Args:
        ffn: the dense weights.
        plan: labels, and down_proj if it was refit.
        layout, mixing: of the whole model.
        router: None in a static plan.
    """

    ffn: FFNWeights
    plan: LayerPlan
    layout: Layout
    mixing: Mixing
    router: Router | None

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        """outputs_TD, which for the calibration tokens are bit for bit what `fit_layer` returned."""
        activations = Activations(self.ffn, inputs_TD)
        order = active_neurons(self.plan, self.layout).to(inputs_TD.device)
        activations.reorder(order)
        if self.router is not None:
            weights_TR = self.mixing.weights(self.router(inputs_TD), self.layout)
            activations.mask(weights_TR, self.layout.expert_width(self.ffn.num_neurons))
        down_DF = self.ffn.down_DF if self.plan.down_DF is None else self.plan.down_DF.to(self.ffn.down_DF)
        return self.ffn.with_bias(_outputs(activations, down_DF[:, order]))


def converted(ffn: FFNWeights, plan: LayerPlan, fit: LayerFit) -> ConvertedFFN:
    """The FFN of a plan that was decided earlier."""
    router = None if plan.router_RD is None else LinearRouter(plan.router_RD)
    return ConvertedFFN(ffn, plan, fit.layout, fit.mixing, router)


def fit_layer(
    ffn: FFNWeights,
    inputs_TD: Tensor,
    fit: LayerFit,
    saved: LayerPlan | None = None,
    *,
    gradient_GD: Tensor | None = None,
    goal_TD: Tensor | None = None,
) -> tuple[ConvertedFFN, Tensor]:
    """Decide one layer.

    Args:
        ffn: the dense FFN.
        inputs_TD: what it sees on the calibration tokens.
        fit: how to decide.
        saved: labels and router to use again instead of finding new ones.
        gradient_GD: loss gradients by the FFN's output for the first G tokens, for methods that need them.
        goal_TD: outputs that the refit aims for; None are those of the dense FFN for the same inputs.

    Returns:
        The converted FFN, everything in it rounded to the checkpoint's dtype, and its outputs_TD.

    Raises:
        InputError: what the neurons do cannot be computed with, or what was fitted does not fit the dtype.
    """
    if ffn.layer in fit.layout.dense_layers or fit.layout.is_whole:
        whole = ConvertedFFN(ffn, whole_plan(ffn.layer, ffn.num_neurons), fit.layout, fit.mixing, None)
        return whole, whole(inputs_TD)
    seed = fit.seed + ffn.layer
    activations = Activations(ffn, inputs_TD)
    stats = measure(ffn, inputs_TD, activations, seed=seed, gradient_GD=gradient_GD)
    labels_F = saved.labels_F if saved else fit.partition(ffn, stats, fit.layout, seed=seed)
    plan = LayerPlan(ffn.layer, labels_F, saved.router_RD if saved else None)
    plan.check(fit.layout)
    order = active_neurons(plan, fit.layout).to(inputs_TD.device)
    activations.reorder(order)
    down_DF = ffn.down_DF[:, order]
    diagnostics = _static_diagnostics(stats, fit.layout)
    router: Router | None = None
    if not fit.layout.is_static:
        router, found = _route(ffn, plan, activations, stats, inputs_TD=inputs_TD, down_DF=down_DF, fit=fit)
        diagnostics |= found
        diagnostics |= _oracle_gain(diagnostics)
    refit_DF = None
    if fit.refit:
        result = refit(activations, _refit_goal(ffn, stats, goal_TD), down_DF, stats.weight_T, seed=seed)
        down_DF = result.down_DF.to(fit.dtype).to(down_DF.dtype)
        refit_DF = ffn.down_DF.to(fit.dtype, copy=True)
        refit_DF[:, order] = down_DF.to(fit.dtype)
        check_fits(f"down_proj of layer {ffn.layer} after its refit", refit_DF)
        diagnostics |= {
            "refit_strength": result.strength,
            "error_without_refit": result.error_before,
            "error_with_refit": result.error_after,
        }
    if isinstance(router, LinearRouter):
        plan = replace(plan, router_RD=router.rows_RD.cpu())
    plan = replace(plan, down_DF=None if refit_DF is None else refit_DF.cpu(), diagnostics=diagnostics)
    outputs_TD = ffn.with_bias(_outputs(activations, down_DF))
    return ConvertedFFN(ffn, plan, fit.layout, fit.mixing, router), outputs_TD


def whole_plan(layer: int, num_neurons: int) -> LayerPlan:
    """Of a layer that stays as it is."""
    return LayerPlan(layer, torch.full((num_neurons,), SHARED, dtype=torch.int16), None)


def _route(
    ffn: FFNWeights,
    plan: LayerPlan,
    activations: Activations,
    stats: ActivationStats,
    *,
    inputs_TD: Tensor,
    down_DF: Tensor,
    fit: LayerFit,
) -> tuple[Router, dict[str, float]]:
    """Fit a router, unless the plan has one, and weight the activations by its choices; returns what they are worth.

    Columns of down_DF are in the order of the activations.
    """
    norms_TR = _expert_norms(activations, down_DF, fit.layout) * stats.weight_T[:, None]
    if plan.router_RD is not None:
        router: Router = LinearRouter(plan.router_RD)
    else:
        task = RoutingTask(ffn, plan.labels_F, fit.layout, stats, inputs_TD, norms_TR, fit.seed + ffn.layer)
        router = _exportable(fit.router(task), inputs_TD, fit.dtype)
        if isinstance(router, LinearRouter):
            check_fits(f"the router of layer {ffn.layer}", router.rows_RD)
    scores_TR = router(inputs_TD)
    shared_energy = stats.energy_F[plan.neurons(SHARED).to(stats.energy_F.device)].sum()
    found = _router_diagnostics(norms_TR, choose_experts(scores_TR, fit.layout), shared_energy, fit.layout)
    activations.mask(fit.mixing.weights(scores_TR, fit.layout), fit.layout.expert_width(ffn.num_neurons))
    return router, found


def _refit_goal(ffn: FFNWeights, stats: ActivationStats, goal_TD: Tensor | None) -> Tensor:
    """What down_proj alone is to give: the bias stays as it is."""
    if goal_TD is None:
        return stats.outputs_TD
    return goal_TD if ffn.down_bias_D is None else goal_TD - ffn.down_bias_D


def active_neurons(plan: LayerPlan, layout: Layout) -> Tensor:
    """Dense indices of the neurons that can ever be active: the shared ones, then each routed expert's."""
    experts = [] if layout.is_static else range(layout.num_routed)
    return torch.cat([plan.neurons(SHARED), *(plan.neurons(expert) for expert in experts)])


def _expert_norms(activations: Activations, down_DF: Tensor, layout: Layout) -> Tensor:
    """norms_TR: the norm of what each routed expert would add to the output, its neurons' columns taken as orthogonal.

    That is cheaper than the products, and on SmolLM2-135M the routers fitted to either kept the same energy.
    """
    routed = slice(down_DF.shape[1] * layout.num_shared // layout.num_experts, None)
    square_n = down_DF[:, routed].square().sum(dim=0)
    rows = [
        (hidden_TF[:, routed].square() * square_n).unflatten(1, (layout.num_routed, -1)).sum(dim=2)
        for _, hidden_TF in activations.chunks()
    ]
    return torch.cat(rows).sqrt()


def _exportable(router: Router, inputs_TD: Tensor, dtype: torch.dtype) -> Router:
    """A linear router as it is written: scores centred over experts and at most ROUTER_LIMIT on the calibration tokens.

    Neither changes the ranking.
    """
    if not isinstance(router, LinearRouter):
        return router
    rows_RD = router.rows_RD - router.rows_RD.mean(dim=0)
    largest = (inputs_TD @ rows_RD.T).abs().max()
    # A silent FFN leaves zeros, which stay zeros.
    return LinearRouter((rows_RD * (ROUTER_LIMIT / largest.clamp(min=1e-30))).to(dtype))


def _static_diagnostics(stats: ActivationStats, layout: Layout) -> dict[str, float]:
    """Massive neurons, and the share of contribution energy that the best static choice of the same size keeps."""
    energy_F = stats.energy_F.sort(descending=True).values
    count = layout.num_active * layout.expert_width(energy_F.numel())
    return {
        "massive_neurons": float(stats.massive_F.sum()),
        "energy_kept_static": _share(energy_F[:count].sum(), energy_F.sum()),
    }


def _router_diagnostics(norms_TR: Tensor, keep_TR: Tensor, shared_energy: Tensor, layout: Layout) -> dict[str, float]:
    """Energy that the router's choices keep, that of an oracle which knows the norms, and the load of the experts."""
    energy_TR = norms_TR.square()
    chosen = (energy_TR * keep_TR).sum() / len(energy_TR)
    best = (energy_TR * choose_experts(norms_TR, layout)).sum() / len(energy_TR)
    total = shared_energy + energy_TR.sum() / len(energy_TR)
    load_R = keep_TR.float().mean(dim=0)
    probability_R = load_R / load_R.sum()
    entropy = -(probability_R * probability_R.clamp(min=torch.finfo(torch.float32).tiny).log()).sum()
    return {
        "energy_kept": _share(shared_energy + chosen, total),
        "energy_kept_oracle": _share(shared_energy + best, total),
        "router_energy_of_oracle": _share(chosen, best),
        "smallest_expert_load": float(load_R.min()),
        "largest_expert_load": float(load_R.max()),
        # One if every expert gets as many tokens as any other.
        "load_entropy": float(entropy) / math.log(len(load_R)) if len(load_R) > 1 else 1.0,
    }


def _oracle_gain(found: Mapping[str, float]) -> dict[str, float]:
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


def _outputs(activations: Activations, down_DF: Tensor) -> Tensor:
    return torch.cat([hidden_TF @ down_DF.T for _, hidden_TF in activations.chunks()])
