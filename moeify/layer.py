"""One layer: partition, router, refit, and what the converted FFN then gives.

Legend: T tokens, D hidden size, F neurons, R routed experts, f neurons of one expert, K routed experts a token uses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.activations import Activations, ActivationStats, FFNWeights, measure
from moeify.partition import Partition
from moeify.plan import SHARED, LayerPlan, Layout
from moeify.refit import refit
from moeify.routers import Router
from moeify.targets import ROUTER_LIMIT


@dataclass(frozen=True)
class LayerFit:
    """The methods and numbers that are the same for every layer."""

    layout: Layout
    partition: Partition
    router: Router
    refit: bool
    dtype: torch.dtype
    seed: int


def fit_layer(
    ffn: FFNWeights, inputs_TD: Tensor, fit: LayerFit, saved: LayerPlan | None = None
) -> tuple[LayerPlan, Tensor]:
    """Decide one layer.

    Args:
        ffn: the dense FFN.
        inputs_TD: what it sees on the calibration tokens.
        fit: how to decide.
        saved: labels and router to use again instead of finding new ones.

    Returns:
        The plan, everything in it rounded to the checkpoint's dtype, and the outputs_TD of the converted FFN as the
        written checkpoint will compute them.
    """
    seed = fit.seed + ffn.layer
    activations = Activations(ffn, inputs_TD)
    stats = measure(ffn, activations, seed=seed)
    labels_F = saved.labels_F if saved else fit.partition(ffn, stats, fit.layout, seed=seed)
    plan = LayerPlan(ffn.layer, labels_F, saved.router_RD if saved else None)
    plan.check(fit.layout)
    order = active_neurons(plan, fit.layout).to(inputs_TD.device)
    activations.reorder(order)
    down_DF = ffn.down_DF[:, order]
    diagnostics = {"massive_neurons": float(stats.massive_F.sum())}
    router_RD = None
    if not fit.layout.is_static:
        router_RD, found = _route(activations, inputs_TD, down_DF, stats, fit, router_RD=plan.router_RD)
        diagnostics |= found
    refit_DF = None
    if fit.refit:
        result = refit(activations, stats.outputs_TD, down_DF, stats.weight_T, seed=seed)
        down_DF = result.down_DF.to(fit.dtype).to(down_DF.dtype)
        refit_DF = ffn.down_DF.to(fit.dtype, copy=True)
        refit_DF[:, order] = down_DF.to(fit.dtype)
        diagnostics |= {
            "refit_strength": result.strength,
            "error_without_refit": result.error_before,
            "error_with_refit": result.error_after,
        }
    router_RD, refit_DF = (None if tensor is None else tensor.cpu() for tensor in (router_RD, refit_DF))
    return LayerPlan(ffn.layer, labels_F, router_RD, refit_DF, diagnostics), _outputs(activations, down_DF)


def _route(
    activations: Activations,
    inputs_TD: Tensor,
    down_DF: Tensor,
    stats: ActivationStats,
    fit: LayerFit,
    *,
    router_RD: Tensor | None,
) -> tuple[Tensor, dict[str, float]]:
    """Fit a router, unless there is one, and mask the activations by its choices; returns it and what it is worth."""
    norms_TR = _expert_norms(activations, down_DF, fit.layout)
    if router_RD is None:
        router_RD = _scaled(fit.router(inputs_TD, norms_TR, stats.weight_T), inputs_TD).to(fit.dtype)
    keep_TR = choose_experts(inputs_TD, router_RD, fit.layout)
    activations.mask(keep_TR, down_DF.shape[1] // fit.layout.num_experts)
    return router_RD, _router_diagnostics(norms_TR, keep_TR, stats, fit.layout)


def replay_layer(ffn: FFNWeights, inputs_TD: Tensor, plan: LayerPlan, layout: Layout) -> Tensor:
    """outputs_TD of a layer decided earlier, bit for bit what `fit_layer` returned with its plan."""
    activations = Activations(ffn, inputs_TD)
    order = active_neurons(plan, layout).to(inputs_TD.device)
    activations.reorder(order)
    if plan.router_RD is not None:
        keep_TR = choose_experts(inputs_TD, plan.router_RD, layout)
        activations.mask(keep_TR, layout.expert_width(ffn.num_neurons))
    down_DF = ffn.down_DF if plan.down_DF is None else plan.down_DF.to(ffn.down_DF)
    return _outputs(activations, down_DF[:, order])


def active_neurons(plan: LayerPlan, layout: Layout) -> Tensor:
    """Dense indices of the neurons that can ever be active: the shared ones, then each routed expert's."""
    experts = [] if layout.is_static else range(layout.num_routed)
    return torch.cat([plan.neurons(SHARED), *(plan.neurons(expert) for expert in experts)])


def choose_experts(inputs_TD: Tensor, router_RD: Tensor, layout: Layout) -> Tensor:
    """keep_TR, True for the K routed experts that score highest for a token."""
    scores_TR = inputs_TD @ router_RD.to(inputs_TD).T
    return _top(scores_TR, layout.num_routed_active)


def _top(scores_TR: Tensor, count: int) -> Tensor:
    chosen = scores_TR.topk(count, dim=1).indices
    return torch.zeros_like(scores_TR, dtype=torch.bool).scatter_(1, chosen, value=True)


def _expert_norms(activations: Activations, down_DF: Tensor, layout: Layout) -> Tensor:
    """norms_TR: the norm of what each routed expert would add to the output."""
    experts_RDf = down_DF.chunk(layout.num_experts, dim=1)[layout.num_shared :]
    return torch.cat(
        [
            torch.stack(
                [
                    (hidden_Tf @ expert_Df.T).norm(dim=1)
                    for hidden_Tf, expert_Df in zip(
                        hidden_TF.chunk(layout.num_experts, dim=1)[layout.num_shared :], experts_RDf, strict=True
                    )
                ],
                dim=1,
            )
            for _, hidden_TF in activations.chunks()
        ]
    )


def _scaled(router_RD: Tensor, inputs_TD: Tensor) -> Tensor:
    """The same ranking, with scores centred over experts and none beyond ROUTER_LIMIT on the calibration tokens."""
    router_RD = router_RD - router_RD.mean(dim=0)
    largest = (inputs_TD @ router_RD.T).abs().max()
    # A silent FFN leaves zeros, which stay zeros.
    return router_RD * (ROUTER_LIMIT / largest.clamp(min=1e-30))


def _router_diagnostics(norms_TR: Tensor, keep_TR: Tensor, stats: ActivationStats, layout: Layout) -> dict[str, float]:
    """Output energy the router keeps relative to an oracle that knows the norms, and how evenly it loads experts."""
    energy_TR = (norms_TR * stats.weight_T[:, None]).square()
    oracle_TR = _top(norms_TR, layout.num_routed_active)
    load_R = keep_TR.float().mean(dim=0)
    best = float((energy_TR * oracle_TR).sum())
    return {
        "router_energy_of_oracle": float((energy_TR * keep_TR).sum()) / best if best else 1.0,
        "smallest_expert_load": float(load_R.min()),
        "largest_expert_load": float(load_R.max()),
    }


def _outputs(activations: Activations, down_DF: Tensor) -> Tensor:
    return torch.cat([hidden_TF @ down_DF.T for _, hidden_TF in activations.chunks()])
