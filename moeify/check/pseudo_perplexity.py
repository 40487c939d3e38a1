"""Pseudo-perplexity of masked language models: each token is masked in turn, and guessed from all others.

Salazar et al., https://arxiv.org/abs/1910.14659. One pass of the model guesses one token, so of a longer text a seeded
sample of places is guessed, the same for every model.

Legend: B rows in a batch, C tokens of one, P guessed places.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeify.check.perplexity import EvalResult, warn_of_few
from moeify.data.examples import BATCH_TOKENS, special_ids, text_examples
from moeify.errors import InputError
from moeify.models.tokenizer import load_tokenizer
from moeify.options import EvalOptions, Track

PSEUDO = "pseudo-perplexity"
# The logarithm of the perplexity of so many is known to about 0.08 (standard deviation of a loss of 2.5 nats).
PLACES = 1024


@dataclass(frozen=True)
class PseudoPerplexity:
    """The measure of masked language models.

    Args:
        texts: of every model and source: ids_BC and their hash.
        around: special tokens before and behind each piece.
        masks: id of the token that stands for a guess, by model.
    """

    texts: Mapping[tuple[str, str], tuple[Tensor, str]]
    around: Mapping[str, tuple[int, int]]
    masks: Mapping[str, int]

    @classmethod
    def open(cls, paths: Mapping[str, Path], options: EvalOptions) -> Self:
        """Read the texts.

        Raises:
            InputError: a text cannot be read, two models cut it into different tokens, or a tokenizer has no mask.
        """
        texts, around, masks = {}, {}, {}
        for name, path in paths.items():
            tokenizer = load_tokenizer(path)
            if tokenizer.mask_token_id is None:
                raise InputError(f"the tokenizer of {name} has no mask token", "copy the one it was trained with")
            before, after = special_ids(tokenizer)
            masks[name], around[name] = int(tokenizer.mask_token_id), (len(before), len(after))
            for source in options.data:
                examples, sha256 = text_examples(path, source, options.tokens, options.context)
                texts[name, source] = torch.cat([one["input_ids"] for one in examples]), sha256
        first = next(iter(paths))
        for (name, source), (_, sha256) in texts.items():
            if sha256 != texts[first, source][1]:
                raise InputError(
                    f"{first} and {name} cut {source} into different tokens", "their perplexities do not compare"
                )
        for source in options.data:
            warn_of_few(source, min(PLACES, texts[first, source][0].numel()))
        return cls(texts, around, masks)

    @torch.no_grad()
    def __call__(self, model: Any, name: str, source: str, track: Track[Any]) -> EvalResult:
        """Guess a sample of the tokens."""
        ids_BC, sha256 = self.texts[name, source]
        rows_P, places_P = sample(ids_BC, *self.around[name])
        size = max(1, BATCH_TOKENS // ids_BC.shape[1])
        loss, began = 0.0, time.perf_counter()
        starts = range(0, len(rows_P), size)
        for start in track(starts, f"evaluating {name} on {source}", len(starts)):
            some = slice(start, start + size)
            masked_BC, row_B = ids_BC[rows_P[some]].clone(), torch.arange(len(rows_P[some]))
            right_B = masked_BC[row_B, places_P[some]]
            masked_BC[row_B, places_P[some]] = self.masks[name]
            logits_BV = model(input_ids=masked_BC.to(model.device)).logits[row_B, places_P[some]]
            loss += float(cross_entropy(logits_BV.float().cpu(), right_B, reduction="sum"))
        elapsed = time.perf_counter() - began
        perplexity = math.exp(loss / len(rows_P)) if math.isfinite(loss) else math.inf
        context, speed = ids_BC.shape[1], len(rows_P) * ids_BC.shape[1] / elapsed
        return EvalResult(name, source, perplexity, len(rows_P), speed, sha256, context, None, measure=PSEUDO)


def sample(ids_BC: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the tokens that are guessed: at most PLACES, none of them special, in reading order."""
    num_rows, context = ids_BC.shape
    inner = context - before - after
    order_P = torch.randperm(num_rows * inner, generator=torch.Generator().manual_seed(0))[:PLACES].sort().values
    return order_P // inner, order_P % inner + before
