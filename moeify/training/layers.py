"""The stage `layers`: every FFN fitted to the dense one's output, one layer at a time, with no backward pass.

Each layer sees what the layers already fitted give it, as in a split. A round trains the router and then solves for
down_proj in closed form; it counts only if it lowers the error on held-out tokens, so a layer never gets worse there.

The router's target is what each expert is worth to each token: with the residual r of the output as it is, taking
expert e with output o_e in, or leaving it out, changes the squared error by 2<r, o_e> - |o_e|^2 or 2<r, o_e> + |o_e|^2.
That is exact for one change at a time, and unlike the gradient of an expert's weight it also says what experts that
were not chosen would have done.

Legend: T tokens, B blocks of C tokens, D hidden size, F active neurons (shared, then expert after expert), f neurons of
one expert, R routed experts, K of them chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from moeify.calibration.activations import CLIP_NORM, Activations
from moeify.calibration.stream import HiddenStream
from moeify.convert.refit import HELD_OUT_SHARE, refit
from moeify.errors import InputError
from moeify.experts.mixing import Mixing, router_features
from moeify.export.in_memory import folds, sites_of_target, split_ffn
from moeify.families import Sites
from moeify.layout import Layout
from moeify.models.dense import DenseModel
from moeify.models.ffn import FFNWeights, joined, pack, unpack
from moeify.models.inputs import Inputs, named
from moeify.models.shallow import without_layers
from moeify.training.model import Student
from moeify.training.options import FinetuneOptions

ROUNDS = 3
PASSES = 2
BATCH_TOKENS = 2048
# Width of the router's decision, in standard deviations of its scores.
SHARPNESS = 0.5


@dataclass(frozen=True)
class LayerFFN:
    """One student FFN, unfolded: the factors that its architecture needs are taken out.

    Args:
        ffn: shared neurons, then expert after expert.
        layout, mixing: of the layer.
        router_RD: rows as they were fitted, not as they are stored; None if nothing is routed.
        units_HC: hidden units of the router, which stay as they are; None if it is linear.
        threshold_R: scores above which experts are chosen, which stay as they are; None where all tokens have as many.
    """

    ffn: FFNWeights
    layout: Layout
    mixing: Mixing
    router_RD: Tensor | None
    units_HC: Tensor | None = None
    threshold_R: Tensor | None = None

    @property
    def width(self) -> int:
        routed = self.layout.num_routed / self.layout.num_experts
        return 0 if self.router_RD is None else round(self.ffn.num_neurons * routed) // self.layout.num_routed

    def activations(self, inputs_TD: Tensor) -> Activations:
        """Masked by the router."""
        activations = Activations(self.ffn, inputs_TD)
        if self.router_RD is not None:
            activations.mask(self.weights(inputs_TD), self.width)
        return activations

    def weights(self, inputs_TD: Tensor) -> Tensor:
        """weights_TR of the routed experts."""
        assert self.router_RD is not None
        scores_TR = router_features(inputs_TD, self.units_HC) @ self.router_RD.T
        return self.mixing.weights(scores_TR if self.threshold_R is None else scores_TR - self.threshold_R, self.layout)

    def __call__(self, inputs_TD: Tensor) -> Tensor:
        """outputs_TD."""
        chunks = self.activations(inputs_TD).chunks()
        return self.ffn.with_bias(torch.cat([hidden_TF @ self.ffn.down_DF.T for _, hidden_TF in chunks]))


@dataclass(frozen=True)
class LayerResult:
    """What a layer became.

    Args:
        error_before, error_after: squared error of its output relative to the dense output, on held-out tokens.
    """

    layer: int
    tensors: dict[str, Tensor]
    error_before: float
    error_after: float


class _Loaded:
    """A loaded stock model as `HiddenStream` wants it."""

    def __init__(self, model: Any, sites: tuple[Sites, ...]) -> None:
        self.sites, self.skeleton, self.tied = sites, model, dict(model.all_tied_weights_keys)
        self._tensors = model.state_dict()

    def get(self, names: Any) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}


def beside(student: Student, teacher: DenseModel) -> DenseModel:
    """The teacher without the layers that the split dropped.

    Raises:
        InputError: its layers cannot stand beside the student's.
    """
    dropped = student.plan.options.drop_layers if student.plan else ()
    if len(dropped) < teacher.num_layers:
        teacher = without_layers(teacher, [layer for layer in dropped if layer < teacher.num_layers])
    mine, its = student.model.config.get_text_config(), teacher.text_config
    for what, name in (("layers", "num_hidden_layers"), ("a hidden size of", "hidden_size")):
        if getattr(mine, name) != getattr(its, name):
            raise InputError(
                f"{teacher.name} has {what} {getattr(its, name):,}, {student.path} has {getattr(mine, name):,}",
                "--stage layers needs the dense model that was cut as the teacher",
            )
    return teacher


def fit_layers(
    student: Student, teacher: DenseModel, inputs: Tensor | Inputs, options: FinetuneOptions
) -> Iterator[LayerResult]:
    """Yield every layer in order, with what it became under the names it has in memory.

    Args:
        student: as it was split.
        teacher: the dense model.
        inputs: of the model; a tensor is blocks of text.
        options: rates, seed and device.
    """
    assert student.plan is not None
    sites = sites_of_target(student.target) if student.target else teacher.sites
    stream = HiddenStream(_Loaded(student.model, sites), named(inputs), options.device)
    for layer in range(teacher.num_layers):
        inputs_TD = stream.attend(layer)
        dense = teacher.ffn(layer).map(lambda tensor: tensor.to(options.device, torch.float32))
        if student.plan.layout.of_layer(layer).is_empty:
            stream.advance(dense.with_bias(torch.zeros_like(inputs_TD)))
            continue
        current = _student_ffn(student, layer, options.device)
        if layer in student.plan.layout.dense_layers:
            stream.advance(current(inputs_TD))
            continue
        fitted, before, after = _fit(current, inputs_TD, dense(inputs_TD), options, seed=options.seed + layer)
        stream.advance(fitted(inputs_TD))
        yield LayerResult(layer, _stored(student, layer, fitted), before, after)


@torch.no_grad()
def _fit(
    ffn: LayerFFN, inputs_TD: Tensor, wanted_TD: Tensor, options: FinetuneOptions, *, seed: int
) -> tuple[LayerFFN, float, float]:
    """The fitted FFN, and its error before and after."""
    norm_T = wanted_TD.norm(dim=1)
    weight_T = (CLIP_NORM * norm_T.median() / norm_T.clamp(min=torch.finfo(norm_T.dtype).tiny)).clamp(max=1)
    boundary = round(len(inputs_TD) * (1 - HELD_OUT_SHARE))
    held = slice(boundary, None)

    def error(candidate: LayerFFN) -> float:
        missing_TD = (wanted_TD[held] - candidate(inputs_TD[held])) * weight_T[held, None]
        energy = (wanted_TD[held] * weight_T[held, None]).square().sum()
        return float(missing_TD.square().sum() / energy) if energy > 0 else 0.0

    rate, first = 0.0 if ffn.layout.is_adaptive else options.rate_of_routers("layers"), error(ffn)
    lowest = first
    for number in range(ROUNDS if ffn.router_RD is not None else 1):
        candidate = ffn
        if ffn.router_RD is not None:
            rows = slice(0, boundary)
            candidate = _train_router(ffn, inputs_TD[rows], wanted_TD[rows], weight_T[rows], rate, seed=seed + number)
        # On the tokens before the boundary alone, so that the held-out ones judge what they did not make.
        fit = slice(0, boundary)
        goal_TD = wanted_TD[fit] if ffn.ffn.down_bias_D is None else wanted_TD[fit] - ffn.ffn.down_bias_D
        solved = refit(candidate.activations(inputs_TD[fit]), goal_TD, candidate.ffn.down_DF, weight_T[fit], seed=seed)
        candidate = replace(candidate, ffn=replace(candidate.ffn, down_DF=solved.down_DF))
        found = error(candidate)
        if found >= lowest:
            break
        ffn, lowest = candidate, found
    return ffn, first, lowest


def _train_router(
    ffn: LayerFFN, inputs_TD: Tensor, wanted_TD: Tensor, weight_T: Tensor, rate: float, *, seed: int
) -> LayerFFN:
    """The same FFN with a router that ranks experts by what they are worth."""
    assert ffn.router_RD is not None
    router_RD = nn.Parameter(ffn.router_RD.clone())
    relative = rate * float(router_RD.detach().square().mean().sqrt())
    if relative == 0:
        return ffn
    optimizer = torch.optim.AdamW([router_RD], lr=relative, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    steps = PASSES * -(-len(inputs_TD) // BATCH_TOKENS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    gram_Rff = _expert_grams(ffn)
    for _ in range(PASSES):
        for rows_T in torch.randperm(len(inputs_TD), generator=generator).split(BATCH_TOKENS):
            rows_T = rows_T.to(inputs_TD.device)  # noqa: PLW2901
            worth_TR = _worth(
                replace(ffn, router_RD=router_RD.detach()), gram_Rff, inputs_TD[rows_T], wanted_TD[rows_T]
            )
            with torch.enable_grad():
                scores_TR = router_features(inputs_TD[rows_T], ffn.units_HC) @ router_RD.T
                loss = _ranking_loss(scores_TR, worth_TR * weight_T[rows_T, None].square(), ffn.layout)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
    return replace(ffn, router_RD=router_RD.detach())


def _expert_grams(ffn: LayerFFN) -> Tensor:
    down_RDf = ffn.ffn.down_DF[:, -ffn.layout.num_routed * ffn.width :].unflatten(1, (ffn.layout.num_routed, ffn.width))
    down_RDf = down_RDf.transpose(0, 1)
    gram_Rff: Tensor = down_RDf.transpose(1, 2) @ down_RDf
    return gram_Rff


def _worth(ffn: LayerFFN, gram_Rff: Tensor, inputs_TD: Tensor, wanted_TD: Tensor) -> Tensor:
    """worth_TR: how much squared error an expert takes away from a token, all other choices as they are."""
    weights_TR = ffn.weights(inputs_TD)
    hidden_TF = ffn.ffn.hidden(inputs_TD)
    routed_TRf = hidden_TF[:, -ffn.layout.num_routed * ffn.width :].unflatten(1, (ffn.layout.num_routed, ffn.width))
    norm_TR = torch.einsum("trf,rfg,trg->tr", routed_TRf, gram_Rff, routed_TRf)
    shared_TF = hidden_TF[:, : -ffn.layout.num_routed * ffn.width]
    masked_TF = torch.cat([shared_TF, (routed_TRf * weights_TR[:, :, None]).flatten(1)], dim=1)
    residual_TD = wanted_TD - masked_TF @ ffn.ffn.down_DF.T
    back_TF = residual_TD @ ffn.ffn.down_DF[:, -ffn.layout.num_routed * ffn.width :]
    overlap_TR = (routed_TRf * back_TF.view_as(routed_TRf)).sum(dim=2)
    # Of a chosen expert the residual already lacks its output.
    worth_TR: Tensor = 2 * overlap_TR + (2 * weights_TR - 1) * norm_TR
    return worth_TR


def _ranking_loss(scores_TR: Tensor, worth_TR: Tensor, layout: Layout) -> Tensor:
    """Cross-entropy of being chosen against deserving it, weighted by what is at stake."""
    chosen = layout.num_routed_active
    stake_TR = worth_TR - _boundary(worth_TR, chosen)
    margin_TR = scores_TR - _boundary(scores_TR, chosen).detach()
    margin_TR = margin_TR / (SHARPNESS * scores_TR.detach().std().clamp(min=1e-30))
    weight_TR = stake_TR.abs() / stake_TR.abs().mean().clamp(min=1e-30)
    loss: Tensor = binary_cross_entropy_with_logits(margin_TR, (stake_TR > 0).to(margin_TR.dtype), weight=weight_TR)
    return loss


def _boundary(values_TR: Tensor, chosen: int) -> Tensor:
    """Midway between the last that is chosen and the first that is not."""
    ordered_TR = values_TR.sort(dim=1, descending=True).values
    return ordered_TR[:, chosen - 1 : min(chosen + 1, ordered_TR.shape[1])].mean(dim=1, keepdim=True)


def _student_ffn(student: Student, layer: int, device: str) -> LayerFFN:
    assert student.plan is not None
    plan, prefix, mixing = student.plan, student.blocks.site(layer), Mixing.of(student.plan.options)
    block = student.model.get_submodule(prefix)
    if student.target is None or layer in plan.layout.dense_layers:
        tensors = {f"{prefix}.{name}": parameter.detach() for name, parameter in block.named_parameters()}
        ffn = unpack(student.dense_ffn, prefix, tensors, layer, student.activation)
        return LayerFFN(ffn.map(lambda tensor: tensor.to(device, torch.float32)), plan.layout, mixing, None)
    experts = split_ffn(block, student.target.modules, layer, student.activation)
    shared_fold, routed_fold = folds(plan, student.target, layer)
    experts = experts.folded(shared=1 / shared_fold, routed=1 / routed_fold, router=1 / student.scale)
    ffn = joined(experts.shared, experts.routed).map(lambda tensor: tensor.to(device, torch.float32))
    router = (experts.router_RD if experts.num_routed else None, experts.units_HC, experts.threshold_R)
    parts = (None if part is None else part.to(device, torch.float32) for part in router)
    return LayerFFN(ffn, plan.layout.of_layer(layer), mixing, *parts)


def _stored(student: Student, layer: int, fitted: LayerFFN) -> dict[str, Tensor]:
    """down_proj, folded, and the router, scaled, under the names they have in the loaded model."""
    prefix, down_DF = student.blocks.site(layer), fitted.ffn.down_DF.cpu()
    if student.target is None:
        name = f"{prefix}.{student.dense_ffn.down}.weight"
        return {name: pack(student.dense_ffn, prefix, fitted.ffn)[name].cpu().contiguous()}
    assert student.plan is not None
    modules, num_routed = student.target.modules, fitted.layout.num_routed
    shared_fold, routed_fold = folds(student.plan, student.target, layer)
    shared = f"{prefix}.{modules.shared}.{modules.shared_down}.weight"
    if fitted.router_RD is None:
        return {shared: (down_DF * shared_fold).contiguous()}
    shared_Ds, routed_DF = down_DF.tensor_split([down_DF.shape[1] - num_routed * fitted.width], dim=1)
    down_RDf = routed_DF.unflatten(1, (num_routed, fitted.width)).transpose(0, 1) * routed_fold
    tensors = {
        f"{prefix}.{modules.experts}.down_proj": down_RDf.contiguous(),
        f"{prefix}.{modules.router}.{modules.router_weight}": fitted.router_RD.cpu() * student.scale,
    }
    if shared_Ds.shape[1]:
        tensors[shared] = (shared_Ds * shared_fold).contiguous()
    return tensors
