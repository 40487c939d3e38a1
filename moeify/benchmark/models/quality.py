"""Quality of several models on the same blocks of text: perplexity, divergence from the dense model, agreement.

Only one block's logits of two models exist at a time, and only CHUNK_TOKENS of them as probabilities.

Legend: B blocks, C tokens of a block, L = C - 1 predictions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeify.benchmark.models.results import ALL_TEXTS, Interval, Quality
from moeify.check.bootstrap import draws, interval, perplexity_of, perplexity_ratio
from moeify.options import Track, untracked

CHUNK_TOKENS = 64


def measure_quality(
    models: Mapping[str, Any],
    dense: str,
    texts: Mapping[str, Tensor],
    *,
    static: Sequence[str] = (),
    track: Track[Any] = untracked,
) -> list[Quality]:
    """One row a text and model, and one a model for the blocks of all texts, if there are several.

    Args:
        models: loaded, by name; all with one vocabulary.
        dense: name of the one that others are compared with.
        texts: ids_BC by name.
        static: names of static models, with which the others are compared as well.
        track: wraps the loop over blocks.
    """
    scores: dict[str, dict[str, Tensor]] = {}
    for data, ids_BC in texts.items():
        blocks: dict[str, list[Tensor]] = {name: [] for name in models}
        for ids_C in track(ids_BC, f"quality on {data}", len(ids_BC)):
            reference_LV = _logits(models[dense], ids_C)
            for name, model in models.items():
                logits_LV = reference_LV if name == dense else _logits(model, ids_C)
                blocks[name].append(block_scores(logits_LV, reference_LV, ids_C[1:].to(logits_LV.device)))
        scores[data] = {name: torch.stack(own) for name, own in blocks.items()}
    if len(texts) > 1:
        scores[ALL_TEXTS] = {name: torch.cat([tables[name] for tables in scores.values()]) for name in models}
    predictions = next(iter(texts.values())).shape[1] - 1
    return [
        _row(
            name,
            data,
            len(table_B3) * predictions,
            table_B3,
            tables[dense],
            controls={} if name in {dense, *static} else {control: tables[control] for control in static},
        )
        for data, tables in scores.items()
        for name, table_B3 in tables.items()
    ]


def block_scores(logits_LV: Tensor, reference_LV: Tensor, ids_L: Tensor) -> Tensor:
    """scores_3, float64: means over predictions of loss, KL(reference || model) in nats, and same likeliest token."""
    total_3 = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(ids_L), CHUNK_TOKENS):
        rows = slice(first, first + CHUNK_TOKENS)
        model_LV, dense_LV = (logits[rows].float().log_softmax(dim=-1) for logits in (logits_LV, reference_LV))
        losses_L = -model_LV.gather(1, ids_L[rows, None])
        kl_LV = torch.nn.functional.kl_div(model_LV, dense_LV, reduction="none", log_target=True)
        agree_L = model_LV.argmax(dim=-1) == dense_LV.argmax(dim=-1)
        total_3 += torch.stack([part.double().sum().cpu() for part in (losses_L, kl_LV, agree_L)])
    return total_3 / len(ids_L)


@torch.no_grad()
def _logits(model: Any, ids_C: Tensor) -> Tensor:
    """logits_LV of all positions that have a next token."""
    logits_CV: Tensor = model(ids_C[None].to(model.device), use_cache=False).logits[0]
    return logits_CV[:-1]


def _row(
    name: str, data: str, num_tokens: int, table_B3: Tensor, dense_B3: Tensor, *, controls: Mapping[str, Tensor]
) -> Quality:
    """Means over blocks, and their intervals from the same draws for every model."""
    losses_B, kl_B, agree_B = table_B3.unbind(dim=1)
    own, ratio = perplexity_of(losses_B), perplexity_ratio(losses_B, dense_B3[:, 0])
    kl_low, kl_high = interval(kl_B[draws(len(kl_B))].mean(dim=1))
    return Quality(
        model=name,
        data=data,
        num_tokens=num_tokens,
        perplexity=own.value,
        perplexity_low=own.low,
        perplexity_high=own.high,
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        kl_nats=float(kl_B.mean()),
        kl_low=kl_low,
        kl_high=kl_high,
        top1_agreement=float(agree_B.mean()),
        over_static={
            control: Interval(*perplexity_ratio(losses_B, control_B3[:, 0])) for control, control_B3 in controls.items()
        },
    )
