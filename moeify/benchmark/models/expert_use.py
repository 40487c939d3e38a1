"""What the routed experts of each layer do on a text: load, company, how good the router's choice is, favourite tokens.

How good a choice is needs the outputs of all experts, which are computed for at most ORACLE_TOKENS tokens, spread over
the text. Memory holds one layer's counts for each different token of the text, and one expert's outputs.

Legend: B blocks of C tokens, T tokens of one block, D hidden size, E experts, K of them chosen, U different tokens of
the text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moeify.benchmark.models.anatomy import experts_modules
from moeify.benchmark.models.results import LayerExperts
from moeify.benchmark.models.routing import watching
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
    occurrences_U: Tensor
    together_EE: Tensor
    chosen_energy: float = 0.0
    best_energy: float = 0.0
    all_energy: float = 0.0
    texts: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
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
    ids_BC, sources = torch.cat(list(texts.values())), [name for name, ids_BC in texts.items() for _ in ids_BC]
    tokens_U, places_BC = ids_BC.unique(return_inverse=True)
    layers: dict[int, _Layer] = {}
    for layer, module in experts_modules(model).items():
        num_experts = int(next(module.parameters()).shape[0])
        zeros = (torch.zeros(len(tokens_U)), torch.zeros(num_experts, num_experts))
        layers[layer] = _Layer(torch.zeros(len(tokens_U), num_experts), *zeros)
    oracle_stride = max(1, -(-ids_BC.numel() // ORACLE_TOKENS))
    forced = False
    places_C, source = places_BC[0], ""

    def see(layer: int, module: Any, inputs_TD: Tensor, chosen_TK: Tensor) -> None:
        nonlocal forced
        if forced:
            return
        found = layers[layer]
        _count(found, places_C, chosen_TK.cpu(), source)
        forced = True
        _compare(found, module, inputs_TD[::oracle_stride], chosen_TK[::oracle_stride])
        forced = False

    with watching(model, see):
        for block in track(range(len(ids_BC)), "experts", len(ids_BC)):
            places_C, source = places_BC[block], sources[block] if len(texts) > 1 else ""
            model.get_decoder()(ids_BC[block : block + 1].to(model.device), use_cache=False)
    words = [text_of(int(token)) for token in tokens_U]
    return [_summary(layer, found, words) for layer, found in sorted(layers.items())]


def _count(found: _Layer, places_T: Tensor, chosen_TK: Tensor, source: str) -> None:
    """Choices of each token, of pairs of experts, and of a text if it has a name."""
    # Numbers past the last expert are none: a token may have fewer experts than there are ranks for.
    num_experts = found.counts_UE.shape[1]
    chose_TE = torch.zeros(len(chosen_TK), num_experts + 1).scatter_(1, chosen_TK, 1.0)[:, :num_experts]
    found.counts_UE.index_add_(0, places_T, chose_TE)
    found.together_EE += chose_TE.T @ chose_TE
    found.occurrences_U += places_T.bincount(minlength=len(found.occurrences_U))
    if source:
        found.texts[source] = found.texts.get(source, 0) + chose_TE.sum(dim=0)


def _compare(found: _Layer, module: Any, inputs_TD: Tensor, chosen_TK: Tensor) -> None:
    """What the choice adds, what the best one would, and what all experts together do: sums of squared norms."""
    energy_TE = output_energies(module, inputs_TD)
    num_experts = energy_TE.shape[1]
    chosen_T1 = (chosen_TK < num_experts).sum(dim=1, keepdim=True)
    found.chosen_energy += float(functional.pad(energy_TE, (0, 1)).gather(1, chosen_TK).sum())
    is_best_TE = torch.arange(num_experts, device=chosen_T1.device) < chosen_T1
    found.best_energy += float((energy_TE.sort(dim=1, descending=True).values * is_best_TE).sum())
    found.all_energy += float(energy_TE.sum())


def output_energies(module: Any, inputs_TD: Tensor) -> Tensor:
    """energy_TE, float32: squared norm of what each expert gives for each token at weight one.

    Through the module itself, whatever its experts are made of.
    """
    num_experts = int(next(module.parameters()).shape[0])
    columns = []
    for expert in range(num_experts):
        chosen_T1 = torch.full((len(inputs_TD), 1), expert, device=inputs_TD.device)
        outputs_TD = module(inputs_TD, chosen_T1, inputs_TD.new_ones(len(inputs_TD), 1))
        columns.append(outputs_TD.float().square().sum(dim=1))
    return torch.stack(columns, dim=1)


def _summary(layer: int, found: _Layer, words: list[str]) -> LayerExperts:
    tokens_E = found.counts_UE.sum(dim=0)
    occurrences_U, num_tokens = found.occurrences_U, float(found.occurrences_U.sum())
    num_experts = len(tokens_E)
    best = found.best_energy
    return LayerExperts(
        layer=layer,
        load=tuple((tokens_E / tokens_E.sum()).tolist()),
        coactivation=_coactivation(found.together_EE / num_tokens),
        # A silent layer loses nothing by any choice.
        oracle_capture=found.chosen_energy / best if best else 1.0,
        random_capture=found.all_energy * float(tokens_E.sum()) / num_tokens / num_experts / best if best else 1.0,
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
