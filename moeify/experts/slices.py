"""Experts as slices of a dense FFN: its neurons in the order of a plan, shared ones first.

Legend: s shared neurons, R routed experts, f neurons of one, D hidden size.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeify.layout import Layout
from moeify.models.ffn import FFNWeights
from moeify.plan import SHARED, LayerPlan


@dataclass(frozen=True)
class SplitFFN:
    """One layer's experts, whatever they were made from; what a target writes and `verify` reads back.

    Args:
        shared: the part that is always on, of zero neurons if nothing is.
        routed: the routed experts, one after the other.
        router_RD: a row for each of them; no rows if nothing is routed.
        units_HC: hidden units of the router and their biases; None if it is linear.
        threshold_R: score above which each expert is chosen; None where every token gets as many.
    """

    shared: FFNWeights
    routed: FFNWeights
    router_RD: Tensor
    units_HC: Tensor | None = None
    threshold_R: Tensor | None = None

    @property
    def num_routed(self) -> int:
        return self.router_RD.shape[0]

    @property
    def gate_sD(self) -> Tensor:
        return _gate(self.shared)

    @property
    def up_sD(self) -> Tensor:
        return self.shared.up_FD

    @property
    def down_Ds(self) -> Tensor:
        return self.shared.down_DF

    @property
    def gate_RfD(self) -> Tensor:
        return self._by_expert(_gate(self.routed))

    @property
    def up_RfD(self) -> Tensor:
        return self._by_expert(self.routed.up_FD)

    @property
    def down_RDf(self) -> Tensor:
        """Columns of each expert, a view."""
        down_DRf: Tensor = self.routed.down_DF.unflatten(1, (self.num_routed, -1))
        return down_DRf.transpose(0, 1)

    def folded(self, *, shared: float, routed: float, router: float) -> "SplitFFN":
        """The same with these factors on the down matrices and on the router."""
        return SplitFFN(
            shared=replace(self.shared, down_DF=self.shared.down_DF * shared),
            routed=replace(self.routed, down_DF=self.routed.down_DF * routed),
            router_RD=self.router_RD * router,
            units_HC=self.units_HC,
            threshold_R=None if self.threshold_R is None else self.threshold_R * router,
        )

    def _by_expert(self, rows_FD: Tensor) -> Tensor:
        rows_RfD: Tensor = rows_FD.unflatten(0, (self.num_routed, -1))
        return rows_RfD


def slice_experts(ffn: FFNWeights, plan: LayerPlan, layout: Layout) -> SplitFFN:
    """Cut a dense FFN as a plan says; all of a layer that stays dense is shared.

    Args:
        ffn: the dense FFN in the dtype of the result; its down_proj gives way to the plan's, if that has one.
        plan: labels, router and refit of this layer.
        layout: of the model.
    """
    if plan.down_DF is not None:
        ffn = replace(ffn, down_DF=plan.down_DF)
    shared = plan.neurons(SHARED)
    if plan.router_RD is None:
        # Neurons that are not shared are dropped from a static plan.
        return SplitFFN(ffn.neurons(shared), ffn.neurons(slice(0)), ffn.up_FD.new_zeros(0, ffn.hidden_size))
    routed = torch.cat([plan.neurons(expert) for expert in range(layout.of_layer(plan.layer).num_routed)])
    return SplitFFN(ffn.neurons(shared), ffn.neurons(routed), plan.router_RD, plan.units_HC, plan.threshold_R)


def _gate(ffn: FFNWeights) -> Tensor:
    # No target takes experts without a gate; which ones it takes is settled before a tensor is read.
    assert ffn.gate_FD is not None
    return ffn.gate_FD
