"""A dense llama whose FFNs are masked by routers: all neurons are computed, and what comes out is what experts give.

Legend: B blocks of C tokens, D hidden size, F neurons, R routed experts of f neurons, L layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.plan import LayerPlan

# Softness of the boundary around which routers feel a gradient, in standard deviations of a token's scores.
SOFTNESS = {"explore": 0.04, "straight 0.3": 0.3, "straight 1": 1.0}
NOISE = 0.1
# How much of the way to the number of experts that a layer is to have its threshold goes in a step.
THRESHOLD_RATE = 0.2
# Of the boundary that tells what an expert is worth, in standard deviations of a layer's scores.
ALLOCATION_SOFTNESS = 0.3


class MaskedFFN(nn.Module):
    """A converted FFN that computes all neurons."""

    def __init__(self, ffn: FFNWeights, plan: LayerPlan, layout: Layout, num_neurons: int) -> None:
        super().__init__()
        assert ffn.gate_FD is not None
        self.gate_FD, self.up_FD, self.down_DF = map(nn.Parameter, (ffn.gate_FD, ffn.up_FD, ffn.down_DF))
        self.rows_RD = None if plan.router_RD is None else nn.Parameter(plan.router_RD.float())
        # How far above its own threshold an expert must score.
        self.threshold_1 = None if plan.threshold_R is None else nn.Parameter(torch.zeros(1))
        self.register_buffer("own_R", None if plan.threshold_R is None else plan.threshold_R.float())
        self.num_routed, self.num_experts = layout.num_routed, layout.num_experts
        self.routed = 0 if self.rows_RD is None else layout.expert_width(num_neurons) * layout.num_routed
        self.least = layout.routed_range[0] if layout.is_adaptive else 0
        self.routers, self.allocates, self.settles = "frozen", False, False
        # Routed experts that a token is to have, in the mean; those that it had in the last pass, and how they grow as
        # the threshold falls.
        self.chosen = float(layout.num_routed_active)
        self.count, self.slope = torch.tensor(self.chosen), torch.tensor(0.0)
        self.share = len(ffn.gate_FD) / num_neurons

    @property
    def active_share(self) -> float:
        """Of the dense FFN's neurons, in the last pass."""
        return (
            self.share
            if self.rows_RD is None
            else self.share + (float(self.count) - self.num_routed) / self.num_experts
        )

    def mask(self, inputs_BCD: Tensor) -> Tensor:
        """mask_BCR, with the gradient that `routers` asks for."""
        assert self.rows_RD is not None
        inputs_BCD = inputs_BCD.float()
        learns = self.training and self.routers != "frozen"
        if learns and self.routers == "explore":
            size_BC1 = inputs_BCD.detach().square().mean(-1, keepdim=True).sqrt()
            inputs_BCD = inputs_BCD + NOISE * size_BC1 * torch.randn_like(inputs_BCD)
        scores_BCR = inputs_BCD @ self.rows_RD.T
        if self.threshold_1 is not None:
            return self._above_threshold(scores_BCR.detach() - self.own_R)
        last_BC2 = scores_BCR.detach().topk(int(self.chosen) + 1, dim=-1).values[..., -2:]
        limit_BC1 = last_BC2.mean(dim=-1, keepdim=True)
        mask_BCR = (scores_BCR.detach() > limit_BC1).float()
        if learns:
            deviation_BC1 = scores_BCR.detach().std(-1, keepdim=True).clamp(min=1e-9)
            soft_BCR = torch.sigmoid((scores_BCR - limit_BC1) / (SOFTNESS[self.routers] * deviation_BC1))
            mask_BCR = mask_BCR + soft_BCR - soft_BCR.detach()
        return mask_BCR

    def _above_threshold(self, scores_BCR: Tensor) -> Tensor:
        assert self.threshold_1 is not None
        if self.settles:
            ordered = scores_BCR.flatten().sort(descending=True).values
            self.threshold_1.data.fill_(ordered[min(round(self.chosen * scores_BCR[..., 0].numel()), len(ordered) - 1)])
        mask_BCR = (scores_BCR > self.threshold_1.detach()).float()
        if self.least:
            mask_BCR = mask_BCR.scatter(-1, scores_BCR.topk(self.least, dim=-1).indices, 1.0)
        self.count = mask_BCR.sum(-1).mean()
        if self.training and self.allocates:
            width = ALLOCATION_SOFTNESS * scores_BCR.std()
            soft_BCR = torch.sigmoid((scores_BCR - self.threshold_1) / width)
            self.slope = (soft_BCR * (1 - soft_BCR)).sum(-1).mean().detach() / width
            mask_BCR = mask_BCR + soft_BCR - soft_BCR.detach()
        return mask_BCR

    @torch.no_grad()
    def follow(self, scale: float) -> None:
        """Move the threshold towards the number of experts that was asked for."""
        assert self.threshold_1 is not None
        self.threshold_1.add_(THRESHOLD_RATE * (self.count - self.chosen) / self.slope.clamp(min=scale))

    def forward(self, inputs_BCD: Tensor, mask_BCR: Tensor | None = None) -> Tensor:
        hidden_BCF = silu(inputs_BCD @ self.gate_FD.T) * (inputs_BCD @ self.up_FD.T)
        if self.rows_RD is not None:
            with torch.autocast(inputs_BCD.device.type, enabled=False):
                mask_BCR = self.mask(inputs_BCD) if mask_BCR is None else mask_BCR
            always_BCF, routed_BCF = hidden_BCF.split([hidden_BCF.shape[-1] - self.routed, self.routed], dim=-1)
            slices_BCRf = routed_BCF.unflatten(-1, (mask_BCR.shape[-1], -1)) * mask_BCR.to(routed_BCF.dtype)[..., None]
            hidden_BCF = torch.cat([always_BCF, slices_BCRf.flatten(-2)], dim=-1)
        return hidden_BCF @ self.down_DF.T


class Allocation:
    """How many routed experts each layer has in the mean, by what one more brings there; their sum stays.

    The gradient of the loss by a threshold over the gradient of the number of experts by it is what an expert brings.
    """

    def __init__(self, ffns: list[MaskedFFN]) -> None:
        self.ffns = [ffn for ffn in ffns if ffn.threshold_1 is not None]
        self.thresholds = [ffn.threshold_1 for ffn in self.ffns if ffn.threshold_1 is not None]
        self.total = sum(ffn.chosen for ffn in self.ffns)
        self.worth_L: Tensor | None = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """After a backward pass.

        Args:
            rate: share of its experts that a layer gains where one more brings twice as much as in the mean.
        """
        slopes_L = torch.stack([ffn.slope for ffn in self.ffns])
        least = float(slopes_L.median()) / 4
        grad_L = torch.cat([threshold_1.grad for threshold_1 in self.thresholds if threshold_1.grad is not None])
        # A rising threshold costs experts, and what they bring.
        worth_L = (grad_L / slopes_L.clamp(min=least)).cpu()
        self.worth_L = worth_L if self.worth_L is None else self.worth_L.lerp(worth_L, 0.05)
        mean = self.worth_L.mean().clamp(min=1e-12)
        change_L = (self.worth_L / mean - 1).clamp(-2, 2)
        wish_L = torch.tensor([ffn.chosen for ffn in self.ffns]) + rate * change_L * self.ffns[0].num_routed
        low_L = torch.tensor([float(max(1, ffn.least)) for ffn in self.ffns])
        high_L = torch.tensor([float(ffn.num_routed) for ffn in self.ffns])
        for _ in range(8):
            wish_L = torch.minimum(torch.maximum(wish_L, low_L), high_L)
            wish_L = wish_L + (self.total - wish_L.sum()) / len(wish_L)
        for ffn, chosen in zip(self.ffns, torch.minimum(torch.maximum(wish_L, low_L), high_L).tolist(), strict=True):
            ffn.chosen = chosen
            ffn.follow(least)
        for threshold_1 in self.thresholds:
            threshold_1.grad = None


@torch.no_grad()
def settle(student: Any, ffns: list[MaskedFFN], ids_BC: Tensor) -> None:
    """Find thresholds anew, layer after layer: what they are compared with has moved."""
    student.train(mode=False)
    for ffn in ffns:
        ffn.settles = True
    student.model(input_ids=ids_BC, use_cache=False)
    for ffn in ffns:
        ffn.settles = False
