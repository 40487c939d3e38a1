"""What the neurons of one FFN do on the calibration tokens.

Legend: T tokens, D hidden size, F neurons, N sampled tokens, R routed experts, f neurons of one expert.

A neuron's *contribution* to a token is the size of what it adds to the output: |h_j(t)| * ||W_down[:, j]||.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.calibration.overflow import LARGEST, check_activations
from moeify.calibration.share import ALONE, Share
from moeify.calibration.store import IN_MEMORY, Store, stretches, widened
from moeify.models.ffn import CHUNK_TOKENS, FFNWeights

# Hidden activations stay in memory up to this size and are recomputed for every pass beyond it.
KEEP_BYTES = 2 << 30
# Contributions are kept for at least so many tokens, and for as many as fit into so many bytes.
SAMPLE_TOKENS = 4096
SAMPLE_BYTES = 128 << 20
# An output this many times the median norm is a massive activation (https://arxiv.org/abs/2402.17762) ...
MASSIVE_NORM = 20.0
# ... and a neuron that makes up this share of one must never be routed away.
MASSIVE_SHARE = 0.3
# A token counts fully in energies and least squares up to this many median norms, and no further beyond.
CLIP_NORM = 5.0


class Activations:
    """hidden_TF of the calibration tokens in chunks, first of all neurons, then reordered by expert, then masked."""

    def __init__(self, ffn: FFNWeights, inputs_TD: Tensor, keep_bytes: int = KEEP_BYTES) -> None:
        self._ffn = ffn
        self._inputs_TD = inputs_TD
        self._order_F: Tensor | None = None
        self._weights_TR: Tensor | None = None
        self._width = 0
        self._kept: list[Tensor] | None = None
        num_bytes = inputs_TD.shape[0] * ffn.num_neurons * ffn.up_FD.element_size()
        if num_bytes <= keep_bytes:
            self._kept = [self._hidden(rows) for rows in self._rows()]

    @property
    def num_tokens(self) -> int:
        return self._inputs_TD.shape[0]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (token rows, hidden) for all tokens in order."""
        for i, rows in enumerate(self._rows()):
            if self._kept is not None:
                yield rows, self._kept[i]
            else:
                yield rows, self._masked(self._reordered(self._hidden(rows)), rows)

    def reorder(self, order_F: Tensor) -> None:
        """Put the columns into this order of neurons; fewer than all drops the rest."""
        self._order_F = order_F
        if self._kept is not None:
            self._kept = [self._reordered(hidden_TF) for hidden_TF in self._kept]

    def mask(self, weights_TR: Tensor, width: int) -> None:
        """Weight each token's routed experts, zero for those it does not use: the last R blocks of `width` columns."""
        self._weights_TR, self._width = weights_TR, width
        if self._kept is not None:
            for hidden_TF, rows in zip(self._kept, self._rows(), strict=True):
                self._masked(hidden_TF, rows)

    def outputs(self, down_DF: Tensor, store: Store = IN_MEMORY, bias_D: Tensor | None = None) -> Tensor:
        """outputs_TD of a down_proj with this order of columns."""
        parts = (hidden_TF @ down_DF.T for _, hidden_TF in self.chunks())
        return store.collect((part if bias_D is None else part.add_(bias_D) for part in parts), self.num_tokens)

    def _rows(self) -> list[slice]:
        return list(stretches(self.num_tokens, CHUNK_TOKENS))

    def _hidden(self, rows: slice) -> Tensor:
        return self._ffn.hidden(widened(self._inputs_TD, rows, self._ffn.up_FD.device))

    def _reordered(self, hidden_TF: Tensor) -> Tensor:
        return hidden_TF if self._order_F is None else hidden_TF.index_select(1, self._order_F)

    def _masked(self, hidden_TF: Tensor, rows: slice) -> Tensor:
        if self._weights_TR is not None:
            weights_TR = self._weights_TR[rows].to(hidden_TF)
            num_routed = weights_TR.shape[1]
            routed = hidden_TF[:, -num_routed * self._width :].unflatten(1, (num_routed, self._width))
            routed.mul_(weights_TR[:, :, None])
        return hidden_TF


@dataclass(frozen=True)
class ActivationStats:
    """What the methods look at.

    Args:
        weight_T: min(1, CLIP_NORM * median norm / norm) of each token's dense output.
        energy_F: mean over tokens of the squared contribution, tokens weighted by weight_T.
        massive_F: True for neurons that make up massive activations.
        outputs_TD: the dense FFN's outputs, without a bias of down_proj, as the store holds them.
        inputs_ND: what the FFN sees on a sample of tokens, of all processes together.
        contribution_NF: what each neuron adds on them, weight * h_j * ||W_down[:, j]||, with the sign of h_j.
        gradient_ND: gradient of the language modelling loss by the FFN's output on them, if it was asked for.
    """

    weight_T: Tensor
    energy_F: Tensor
    massive_F: Tensor
    outputs_TD: Tensor
    inputs_ND: Tensor
    contribution_NF: Tensor
    gradient_ND: Tensor | None = None


def measure(
    ffn: FFNWeights,
    inputs_TD: Tensor,
    activations: Activations,
    *,
    seed: int,
    gradient_GD: Tensor | None = None,
    store: Store = IN_MEMORY,
    share: Share = ALONE,
) -> ActivationStats:
    """Collect the statistics of one layer in two passes over its activations.

    Massive activations come from a few tokens and one or two neurons. Left alone they dominate every mean; left out,
    the converted model loses them and breaks: static pruning with refit on SmolLM2-135M gave perplexity 85.7, not 39.7.

    Args:
        ffn: the dense FFN.
        inputs_TD: what it sees.
        activations: of these inputs, all neurons in order.
        seed: of the sample.
        gradient_GD: gradients for the first G tokens, which then are the sample.
        store: holds the outputs.
        share: whose tokens these are.

    Raises:
        InputError: what the neurons do cannot be computed with.
    """
    outputs_TD = activations.outputs(ffn.down_DF, store)
    check_activations(outputs_TD, f"layer {ffn.layer}: the outputs of its FFN")
    norm_T = torch.cat([_norms(outputs_TD, rows, ffn) for rows in stretches(activations.num_tokens)])
    median = share.gather(norm_T).median()
    weight_T = (CLIP_NORM * median / norm_T.clamp(min=torch.finfo(norm_T.dtype).tiny)).clamp(max=1)
    before, num_tokens = share.place(activations.num_tokens)
    if gradient_GD is None:
        generator = torch.Generator().manual_seed(seed)
        sample_N = torch.randperm(num_tokens, generator=generator)[: sample_size(ffn.num_neurons)].sort().values
    else:
        sample_N = torch.arange(gradient_GD.shape[0])
    sample_N = sample_N[(sample_N >= before) & (sample_N < before + activations.num_tokens)] - before
    column_norm_F = ffn.down_DF.norm(dim=0)
    energy_F = torch.zeros_like(column_norm_F)
    massive_F = torch.zeros_like(column_norm_F, dtype=torch.bool)
    contributions = [column_norm_F.new_empty(0, ffn.num_neurons)]
    for rows, hidden_TF in activations.chunks():
        energy_F += weight_T[rows].square() @ hidden_TF.square()
        local_N = (sample_N[(sample_N >= rows.start) & (sample_N < rows.stop)] - rows.start).to(hidden_TF.device)
        contributions.append(hidden_TF[local_N].mul_(weight_T[rows][local_N, None]))
        massive_T = (norm_T[rows] > MASSIVE_NORM * median).nonzero().squeeze(1)
        share_TF = (hidden_TF[massive_T] * column_norm_F).abs() / norm_T[rows][massive_T, None]
        massive_F |= (share_TF > MASSIVE_SHARE).any(dim=0)
    energy_F = share.sum(energy_F)
    # Of the activations alone as well: the refit adds up their squares.
    check_activations(energy_F, f"layer {ffn.layer}: the squares of its neurons", LARGEST**2)
    energy_F = energy_F * column_norm_F.square() / num_tokens
    check_activations(energy_F, f"layer {ffn.layer}: the squares of what its neurons contribute", LARGEST**2)
    return ActivationStats(
        weight_T=weight_T,
        energy_F=energy_F,
        massive_F=share.max(massive_F.to(torch.uint8)).bool(),
        outputs_TD=outputs_TD,
        inputs_ND=share.gather(widened(inputs_TD, sample_N, ffn.up_FD.device)),
        contribution_NF=share.gather(torch.cat(contributions).mul_(column_norm_F)),
        gradient_ND=gradient_GD,
    )


def _norms(outputs_TD: Tensor, rows: slice, ffn: FFNWeights) -> Tensor:
    norm_T: Tensor = widened(outputs_TD, rows, ffn.up_FD.device).norm(dim=1)
    return norm_T


def sample_size(num_neurons: int) -> int:
    """Tokens whose contributions are kept."""
    return max(SAMPLE_TOKENS, SAMPLE_BYTES // (4 * num_neurons))
