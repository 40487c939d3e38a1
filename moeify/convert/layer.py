"""One layer: partition, router, refit, and what the converted FFN then gives.

Legend: T tokens, D hidden size, F neurons, R routed experts, f neurons of one expert, K routed experts a token uses.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeify.calibration.activations import KEEP_BYTES, Activations, ActivationStats, measure
from moeify.calibration.share import ALONE, Share
from moeify.calibration.store import IN_MEMORY, Store, stretches, widened
from moeify.convert.diagnostics import oracle_gain, router_diagnostics, static_diagnostics
from moeify.convert.refit import refit
from moeify.experts.mixing import UNIT, Mixing, above_threshold, common_shift, router_features
from moeify.export.writer import check_fits
from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.partition import Partition
from moeify.plan import SHARED, LayerPlan
from moeify.routers import Fit, LinearRouter, Router, RoutingTask
from moeify.targets import ROUTER_LIMIT


@dataclass(frozen=True)
class LayerFit:
    """The methods and numbers that are the same for every layer.

    Args:
        layout, partition, router, mixing, refit, dtype, seed: as the options say.
        store: holds what is as long as the text.
        share: whose tokens these are.
    """

    layout: Layout
    partition: Partition
    router: Fit
    mixing: Mixing
    refit: bool
    dtype: torch.dtype
    seed: int
    store: Store = IN_MEMORY
    share: Share = ALONE


@dataclass(frozen=True)
class ConvertedFFN:
    """One FFN as the written checkpoint will compute it.

    Args:
        ffn: the dense weights.
        plan: labels, and down_proj if it was refit.
        layout, mixing: of the layer.
        router: None in a static plan.
        store: holds the outputs.
    """

    ffn: FFNWeights
    plan: LayerPlan
    layout: Layout
    mixing: Mixing
    router: Router | None
    store: Store = IN_MEMORY

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        """outputs_TD, which for the calibration tokens are bit for bit what `fit_layer` returned."""
        if self.layout.is_empty:
            device = self.ffn.up_FD.device
            inputs = (widened(inputs_TD, rows, device) for rows in stretches(len(inputs_TD)))
            return self.store.collect((self.ffn.with_bias(torch.zeros_like(part)) for part in inputs), len(inputs_TD))
        activations = _activations(self.ffn, inputs_TD, self.store)
        order = active_neurons(self.plan, self.layout).to(self.ffn.up_FD.device)
        activations.reorder(order)
        if self.router is not None:
            scores_TR = _scores(self.router, self.ffn, inputs_TD, self.store)
            weights_TR = _weights(self.mixing, scores_TR, self.layout, self.store)
            activations.mask(weights_TR, self.layout.expert_width(self.ffn.num_neurons))
        down_DF = self.ffn.down_DF if self.plan.down_DF is None else self.plan.down_DF.to(self.ffn.down_DF)
        return activations.outputs(down_DF[:, order], self.store, self.ffn.down_bias_D)


def converted(ffn: FFNWeights, plan: LayerPlan, fit: LayerFit) -> ConvertedFFN:
    """The FFN of a plan that was decided earlier."""
    router = None if plan.router_RD is None else LinearRouter(plan.router_RD, plan.units_HC, plan.threshold_R)
    return ConvertedFFN(ffn, plan, fit.layout.of_layer(ffn.layer), fit.mixing, router, fit.store)


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
    fit = replace(fit, layout=fit.layout.of_layer(ffn.layer))
    if fit.layout.is_whole or fit.layout.is_empty:
        plan = fixed_plan(ffn.layer, ffn.num_neurons, fit.layout)
        fixed = ConvertedFFN(ffn, plan, fit.layout, fit.mixing, None, fit.store)
        return fixed, fixed(inputs_TD)
    activations = _activations(ffn, inputs_TD, fit.store)
    plan, router, down_DF = _decide(ffn, inputs_TD, activations, fit, saved, gradient_GD=gradient_GD, goal_TD=goal_TD)
    outputs_TD = activations.outputs(down_DF, fit.store, ffn.down_bias_D)
    return ConvertedFFN(ffn, plan, fit.layout, fit.mixing, router, fit.store), outputs_TD


def _decide(
    ffn: FFNWeights,
    inputs_TD: Tensor,
    activations: Activations,
    fit: LayerFit,
    saved: LayerPlan | None,
    *,
    gradient_GD: Tensor | None,
    goal_TD: Tensor | None,
) -> tuple[LayerPlan, Router | None, Tensor]:
    """The plan, its router, and down_proj in the order of the activations, which then are those of the plan."""
    seed = fit.seed + ffn.layer
    stats = measure(ffn, inputs_TD, activations, seed=seed, gradient_GD=gradient_GD, store=fit.store, share=fit.share)
    labels_F = saved.labels_F if saved else fit.share.first(lambda: fit.partition(ffn, stats, fit.layout, seed=seed))
    plan = LayerPlan(ffn.layer, labels_F, None)
    if saved:
        plan = replace(plan, router_RD=saved.router_RD, units_HC=saved.units_HC, threshold_R=saved.threshold_R)
    plan.check(fit.layout)
    order = active_neurons(plan, fit.layout).to(ffn.up_FD.device)
    activations.reorder(order)
    down_DF = ffn.down_DF[:, order]
    diagnostics = static_diagnostics(stats, fit.layout)
    router: Router | None = None
    if not fit.layout.is_static:
        router, found = _route(ffn, plan, activations, stats, inputs_TD=inputs_TD, down_DF=down_DF, fit=fit)
        diagnostics |= found
        diagnostics |= oracle_gain(diagnostics)
    refit_DF = None
    if fit.refit:
        goal_TD, bias_D = (stats.outputs_TD, None) if goal_TD is None else (goal_TD, ffn.down_bias_D)
        result = refit(activations, goal_TD, down_DF, stats.weight_T, seed=seed, less_D=bias_D, share=fit.share)
        down_DF = result.down_DF.to(fit.dtype).to(down_DF.dtype)
        refit_DF = ffn.down_DF.to(fit.dtype, copy=True)
        refit_DF[:, order] = down_DF.to(fit.dtype)
        check_fits(f"down_proj of layer {ffn.layer} after its refit", refit_DF)
        diagnostics |= {
            "refit_strength": result.strength,
            "error_without_refit": result.error_before,
            "error_with_refit": result.error_after,
            "error_with_half_the_tokens": result.error_of_half,
            "error_with_twice_the_tokens": result.error_of_twice,
        }
    if isinstance(router, LinearRouter):
        units_HC, threshold_R = (None if part is None else part.cpu() for part in (router.units_HC, router.threshold_R))
        plan = replace(plan, router_RD=router.rows_RD.cpu(), units_HC=units_HC, threshold_R=threshold_R)
    plan = replace(plan, down_DF=None if refit_DF is None else refit_DF.cpu(), diagnostics=diagnostics)
    return plan, router, down_DF


def fixed_plan(layer: int, num_neurons: int, layout: Layout) -> LayerPlan:
    """Of a layer that stays as it is, or of which nothing stays.

    Args:
        layer: its number.
        num_neurons: of its FFN.
        layout: of the layer.
    """
    labels_F = torch.full((num_neurons,), SHARED)
    if layout.is_empty:
        labels_F = torch.arange(num_neurons) // layout.expert_width(num_neurons)
    return LayerPlan(layer, labels_F.to(torch.int16), None)


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
    norms_TR = _expert_norms(activations, down_DF, stats.weight_T, fit)
    if plan.router_RD is not None:
        router: Router = LinearRouter(plan.router_RD, plan.units_HC, plan.threshold_R)
    else:
        task = RoutingTask(ffn, plan.labels_F, fit.layout, stats, inputs_TD, norms_TR, fit.seed + ffn.layer, fit.share)
        router = _exportable(fit.router(task), ffn, inputs_TD, fit)
        for part in (router.rows_RD, router.units_HC) if isinstance(router, LinearRouter) else ():
            if part is not None:
                check_fits(f"the router of layer {ffn.layer}", part)
    scores_TR = _scores(router, ffn, inputs_TD, fit.store)
    shared_energy = stats.energy_F[plan.neurons(SHARED).to(stats.energy_F.device)].sum()
    found = router_diagnostics(norms_TR, scores_TR, shared_energy, fit.layout, fit.share)
    weights_TR = _weights(fit.mixing, scores_TR, fit.layout, fit.store)
    activations.mask(weights_TR, fit.layout.expert_width(ffn.num_neurons))
    return router, found


def _activations(ffn: FFNWeights, inputs_TD: Tensor, store: Store) -> Activations:
    """What is on a disk because memory is short is computed again for every pass."""
    return Activations(ffn, inputs_TD, KEEP_BYTES if store.folder is None else 0)


def _scores(router: Router, ffn: FFNWeights, inputs_TD: Tensor, store: Store) -> Tensor:
    """scores_TR of all tokens."""
    device = ffn.up_FD.device
    parts = (router(widened(inputs_TD, rows, device)) for rows in stretches(len(inputs_TD)))
    return store.collect(parts, len(inputs_TD), exact=True)


def _weights(mixing: Mixing, scores_TR: Tensor, layout: Layout, store: Store) -> Tensor:
    """weights_TR of all tokens."""
    parts = (mixing.weights(scores_TR[rows], layout) for rows in stretches(len(scores_TR)))
    return store.collect(parts, len(scores_TR), exact=True)


def active_neurons(plan: LayerPlan, layout: Layout) -> Tensor:
    """Dense indices of the neurons that can ever be active: the shared ones, then each routed expert's."""
    experts = [] if layout.is_static else range(layout.num_routed)
    return torch.cat([plan.neurons(SHARED), *(plan.neurons(expert) for expert in experts)])


def _expert_norms(activations: Activations, down_DF: Tensor, weight_T: Tensor, fit: LayerFit) -> Tensor:
    """norms_TR: the norm of what each routed expert would add to the output, its neurons' columns taken as orthogonal.

    That is cheaper than the products, and on SmolLM2-135M the routers fitted to either kept the same energy.
    """
    layout = fit.layout
    routed = slice(down_DF.shape[1] * layout.num_shared // layout.num_experts, None)
    square_n = down_DF[:, routed].square().sum(dim=0)

    def norms(rows: slice, hidden_TF: Tensor) -> Tensor:
        squares_TR = (hidden_TF[:, routed].square() * square_n).unflatten(1, (layout.num_routed, -1)).sum(dim=2)
        norms_TR: Tensor = squares_TR.sqrt() * weight_T[rows, None]
        return norms_TR

    parts = (norms(rows, hidden_TF) for rows, hidden_TF in activations.chunks())
    return fit.store.collect(parts, activations.num_tokens, exact=True)


def _exportable(router: Router, ffn: FFNWeights, inputs_TD: Tensor, fit: LayerFit) -> Router:
    """A router as it is written: scores centred over experts and at most ROUTER_LIMIT on the calibration tokens.

    Neither changes the ranking of experts. They are not centred where a token has as many experts as it needs: there
    scores rank tokens, too.
    """
    if not isinstance(router, LinearRouter):
        return router
    rows_RD = router.rows_RD if fit.layout.is_adaptive else router.rows_RD - router.rows_RD.mean(dim=0)
    units_HC = None if router.units_HC is None else router.units_HC.to(fit.dtype)
    inputs = (widened(inputs_TD, rows, ffn.up_FD.device) for rows in stretches(len(inputs_TD)))
    parts = (router_features(part_TD, units_HC) @ rows_RD.T for part_TD in inputs)
    largest = fit.share.max(torch.stack([part_TR.abs().max() for part_TR in parts]).max())
    # A silent FFN leaves zeros, which stay zeros.
    scale = ROUTER_LIMIT / largest.clamp(min=1e-30)
    rows_RD = (rows_RD * scale).to(fit.dtype)
    own_R = None if router.threshold_R is None else router.threshold_R * scale
    linear = LinearRouter(*fit.share.first(lambda: (rows_RD, units_HC, own_R)))
    return _with_threshold(linear, ffn, inputs_TD, fit) if fit.layout.is_adaptive else linear


def _with_threshold(router: LinearRouter, ffn: FFNWeights, inputs_TD: Tensor, fit: LayerFit) -> LinearRouter:
    """The router with scores above which experts are chosen: as many as the layout says, in the mean over tokens.

    The thresholds that it has are moved by one number.
    """
    scores_TR = _scores(replace(router, threshold_R=None), ffn, inputs_TD, fit.store)
    own_R = router.rows_RD.new_zeros(fit.layout.num_routed) if router.threshold_R is None else router.threshold_R
    _, num_tokens = fit.share.place(len(scores_TR))

    def moved(shift: float) -> Tensor:
        return (own_R.float() + shift).to(router.rows_RD)

    def mean(shift: float) -> float:
        parts = (scores_TR[rows] - moved(shift).float() for rows in stretches(len(scores_TR)))
        counts = [above_threshold(part_TR, fit.layout).sum() for part_TR in parts]
        return float(fit.share.sum(torch.stack(counts).sum().double())) / num_tokens

    most = float(own_R.abs().max()) + 2 * ROUTER_LIMIT
    return replace(router, threshold_R=moved(common_shift(mean, most, fit.layout.num_routed_active)))


def settled(cut: ConvertedFFN, inputs_TD: Tensor, fit: LayerFit) -> ConvertedFFN:
    """The same with its thresholds moved so that these tokens have as many experts as the layout says, in the mean."""
    if not isinstance(cut.router, LinearRouter) or cut.router.threshold_R is None:
        return cut
    fit = replace(fit, layout=cut.layout)
    return replace(cut, router=_with_threshold(cut.router, cut.ffn, inputs_TD, fit))


def num_active(cut: ConvertedFFN, inputs_TD: Tensor) -> float:
    """Experts that run for one of these tokens, shared ones included, in the mean."""
    if cut.router is None:
        return float(cut.layout.num_active)
    scores_TR = _scores(cut.router, cut.ffn, inputs_TD, cut.store)
    chosen = int((UNIT.weights(scores_TR, cut.layout) > 0).sum())
    return cut.layout.num_shared + chosen / len(scores_TR)
