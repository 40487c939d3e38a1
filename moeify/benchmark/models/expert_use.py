"""What the routed experts of each layer do on examples: load, company, how good the router's choice is, favourites.

Favourites are tokens of a text, or positions of an image.

How good a choice is needs the outputs of all experts, which are computed for at most ORACLE_TOKENS tokens, spread over
the text. Memory holds one layer's counts for each different token of the text, and one expert's outputs.

Legend: B blocks of C tokens, T tokens of one block, D hidden size, E experts, K of them chosen at most, U different
tokens of the text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moeify.benchmark.models.anatomy import experts_modules, writes_text
from moeify.benchmark.models.results import LayerExperts
from moeify.benchmark.models.routing import watching
from moeify.check.features import on_device
from moeify.models.inputs import Inputs, uncached
from moeify.options import Track, untracked

ORACLE_TOKENS = 2048
NUM_TOP_TOKENS = 8
# A token that is rarer says little about an expert.
SMALLEST_COUNT = 4
DIGITS = 4


@dataclass
class _Layer:
    """Sums over the text."""

    counts_UE: Tensor
    together_EE: Tensor
    chosen_energy: float = 0.0
    best_energy: float = 0.0
    all_energy: float = 0.0
    num_choices: float = 0.0
    num_tokens: int = 0
    texts: dict[str, Tensor] = field(default_factory=dict)


# Inputs of one block, the place of each of its tokens among the U, and the source that it is of.
Block = tuple[Inputs, Tensor, str]


def expert_use(
    model: Any, texts: Mapping[str, Tensor], text_of: Callable[[int], str], *, track: Track[Any] = untracked
) -> list[LayerExperts]:
    """One entry a layer with experts.

    Args:
        model: loaded, with routed experts.
        texts: ids_BC by name.
        text_of: turns a token id into text.
        track: wraps the loop over blocks.
    """
    tokens_U, places_BC = torch.cat(list(texts.values())).unique(return_inverse=True)
    named = [(name, ids_C) for name, ids_BC in texts.items() for ids_C in ids_BC]
    blocks: list[Block] = [
        ({"input_ids": ids_C[None]}, places_C, name) for (name, ids_C), places_C in zip(named, places_BC, strict=True)
    ]
    return _use(model, blocks, [text_of(int(token)) for token in tokens_U], track)


def image_expert_use(
    model: Any, images: Mapping[str, Sequence[Inputs]], num_positions: int, *, track: Track[Any] = untracked
) -> list[LayerExperts]:
    """The same of images, whose tokens are their positions.

    Args:
        model: loaded, with routed experts.
        images: inputs of B = 1 by source.
        num_positions: that the model makes of an image.
        track: wraps the loop over images.
    """
    places_C = torch.arange(num_positions)
    blocks: list[Block] = [(inputs, places_C, name) for name, some in images.items() for inputs in some]
    return _use(model, blocks, [f"position {place}" for place in range(num_positions)], track)


@torch.no_grad()
def _use(model: Any, blocks: Sequence[Block], words: list[str], track: Track[Any]) -> list[LayerExperts]:
    layers: dict[int, _Layer] = {}
    for layer, module in experts_modules(model).items():
        num_experts = _num_experts(module)
        layers[layer] = _Layer(torch.zeros(len(words), num_experts), torch.zeros(num_experts, num_experts))
    num_tokens, several = sum(len(places_C) for _, places_C, _ in blocks), len({source for *_, source in blocks}) > 1
    oracle_stride = max(1, -(-num_tokens // ORACLE_TOKENS))
    forced = False
    _, places_C, source = blocks[0]

    def see(layer: int, module: Any, inputs_TD: Tensor, chosen_TK: Tensor) -> None:
        nonlocal forced
        if forced:
            return
        found = layers[layer]
        _count(found, places_C, chosen_TK.cpu(), source if several else "")
        forced = True
        _compare(found, module, inputs_TD[::oracle_stride], chosen_TK[::oracle_stride])
        forced = False

    # Of a language model what reads text alone, whatever else it takes.
    below = model.get_decoder() if writes_text(model.config) else model.base_model
    with watching(model, see):
        for inputs, places_C, source in track(blocks, "experts", len(blocks)):  # noqa: B007
            below(**on_device(inputs, model), **uncached(below))
    occurrences_U = torch.cat([places_C for _, places_C, _ in blocks]).bincount(minlength=len(words)).float()
    return [_summary(layer, found, occurrences_U, words) for layer, found in sorted(layers.items())]


def _num_experts(module: Any) -> int:
    return int(next(module.parameters()).shape[0])


def _count(found: _Layer, places_T: Tensor, chosen_TK: Tensor, source: str) -> None:
    """Choices of each token, of pairs of experts, and of a text if it has a name."""
    num_experts = found.counts_UE.shape[1]
    # Where the number of experts is a token's own, places that it leaves empty hold what is no expert's number.
    chose_TE = torch.zeros(len(chosen_TK), num_experts + 1).scatter_(1, chosen_TK.clamp(max=num_experts), 1.0)
    chose_TE = chose_TE[:, :num_experts]
    found.counts_UE.index_add_(0, places_T, chose_TE)
    found.together_EE += chose_TE.T @ chose_TE
    found.num_choices += float(chose_TE.sum())
    found.num_tokens += len(chosen_TK)
    if source:
        found.texts[source] = found.texts.get(source, 0) + chose_TE.sum(dim=0)


def _compare(found: _Layer, module: Any, inputs_TD: Tensor, chosen_TK: Tensor) -> None:
    """What the choice adds, what the best one would, and what all experts together do: sums of squared norms."""
    energy_TE = output_energies(module, inputs_TD)
    is_expert_TK = chosen_TK < energy_TE.shape[1]
    chosen_energy_TK = energy_TE.gather(1, chosen_TK.where(is_expert_TK, 0))
    best_TK = energy_TE.topk(chosen_TK.shape[1], dim=1).values
    # As many of the best as the token chose.
    is_best_TK = torch.arange(chosen_TK.shape[1], device=best_TK.device) < is_expert_TK.sum(dim=1, keepdim=True)
    found.chosen_energy += float((chosen_energy_TK * is_expert_TK).sum())
    found.best_energy += float((best_TK * is_best_TK).sum())
    found.all_energy += float(energy_TE.sum())


def output_energies(module: Any, inputs_TD: Tensor) -> Tensor:
    """energy_TE, float32: squared norm of what each expert gives for each token at weight one.

    Through the module itself, whatever its experts are made of.
    """
    columns = []
    for expert in range(_num_experts(module)):
        chosen_T1 = torch.full((len(inputs_TD), 1), expert, device=inputs_TD.device)
        outputs_TD = module(inputs_TD, chosen_T1, inputs_TD.new_ones(len(inputs_TD), 1))
        columns.append(outputs_TD.float().square().sum(dim=1))
    return torch.stack(columns, dim=1)


def _summary(layer: int, found: _Layer, occurrences_U: Tensor, words: list[str]) -> LayerExperts:
    tokens_E = found.counts_UE.sum(dim=0)
    num_tokens = float(found.num_tokens)
    num_experts = len(tokens_E)
    best = found.best_energy
    return LayerExperts(
        layer=layer,
        load=tuple((tokens_E / tokens_E.sum()).tolist()),
        coactivation=_coactivation(found.together_EE / num_tokens),
        # A silent layer loses nothing by any choice.
        oracle_capture=found.chosen_energy / best if best else 1.0,
        random_capture=found.all_energy * found.num_choices / num_tokens / num_experts / best if best else 1.0,
        top_tokens=tuple(
            tuple(words[place] for place in top_places(found.counts_UE, occurrences_U, expert))
            for expert in range(num_experts)
        ),
        texts={name: tuple((chosen_E / chosen_E.sum()).tolist()) for name, chosen_E in found.texts.items()},
    )


def _coactivation(together_EE: Tensor) -> tuple[tuple[float, ...], ...]:
    """P(i and j) / (P(i) P(j)) - 1; zero on the diagonal and for experts that no token chose."""
    share_E = together_EE.diagonal()
    expected_EE = share_E[:, None] * share_E
    excess_EE = torch.where(expected_EE > 0, together_EE / expected_EE.clamp(min=1e-30) - 1, 0.0)
    excess_EE.fill_diagonal_(0.0)
    return tuple(tuple(round(value, DIGITS) for value in row) for row in excess_EE.tolist())


def top_places(counts_UE: Tensor, occurrences_U: Tensor, expert: int) -> list[int]:
    """Rows of the tokens whose share among those that chose an expert is largest relative to their share of the text.

    For one expert that is the order of how often a token, when it occurs, chooses it. Of equals the more frequent token
    comes first.
    """
    often_U = occurrences_U >= SMALLEST_COUNT
    chose_U = counts_UE[:, expert] * often_U
    share_U = chose_U / occurrences_U.clamp(min=1)
    places = sorted(chose_U.nonzero().flatten().tolist(), key=lambda place: (-share_U[place], -chose_U[place], place))
    return places[:NUM_TOP_TOKENS]
