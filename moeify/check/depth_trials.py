"""The controls by depth in a comparison: at the very FFN budget of the others, whole layers or FFNs alone are gone.

A budget is seldom a whole number of layers. So as many go as it allows, and of one more FFN static pruning with refit
takes the rest: 75 % of 30 layers leaves out seven and half of the FFN of another.

Legend: T tokens, D hidden size, B blocks of C tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeify.check.trials import Trial, Trials
from moeify.convert.depth import check_inputs, choose_absent
from moeify.convert.layer import fit_layer
from moeify.convert.prepare import Prepared, prepare
from moeify.convert.search_scores import Absent
from moeify.convert.texts import Blocks
from moeify.models.ffn import FFNWeights
from moeify.options import SplitOptions, untracked
from moeify.strategies import TOLERANCE


@dataclass(frozen=True)
class DepthTrial:
    """What is left out, and of what text it is chosen by.

    Args:
        whole: the dense model, prepared in any way.
        blocks: what splits are calibrated on.
        options: of the splits beside it.
        absent: layers, or their FFNs.
        budget: share of the FFN parameters that a token uses.
    """

    whole: Prepared
    blocks: Blocks
    options: SplitOptions
    absent: Absent
    budget: float

    def measure(self, trials: Trials) -> Trial:
        """Choose, and try it; how many layers are gone is among the diagnostics."""
        dense, experts = self.whole.dense, self.options.experts
        assert experts is not None
        surplus = (1 - self.budget) * dense.num_layers
        num_gone = int(surplus + TOLERANCE)
        chosen_by = check_inputs(self.blocks.inputs, self.blocks.provenance.context)
        gone, (pruned, *others) = choose_absent(self.whole, chosen_by, self.absent, num_gone, untracked)
        active = round(experts * (1 - (surplus - num_gone)))
        static = replace(self.options, static=True, shared=None, active=active)
        if active < experts:
            static = replace(static, dense_layers=tuple(sorted(others)))
        if self.absent is Absent.LAYER:
            trial = trials.split(prepare(dense, replace(static, drop_layers=gone), writable=False))
            return replace(trial, diagnostics={**trial.diagnostics, "dropped_layers": len(gone)})
        fit = prepare(dense, replace(static, dense_layers=()), writable=False).fit()

        def control(ffn: FFNWeights, inputs_TD: Tensor) -> Callable[[Tensor], Tensor]:
            if ffn.layer in gone:
                return torch.zeros_like
            return fit_layer(ffn, inputs_TD, fit)[0] if ffn.layer == pruned else ffn

        return replace(trials.control(control), diagnostics={"dropped_ffns": len(gone)})
